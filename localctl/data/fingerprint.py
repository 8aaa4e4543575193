"""Fingerprints of a dataset: a few hashes by which a resumed run notices that its data has changed.

They cover all names and captions, which are in memory, and the files of a seeded sample of the rows, as these may lie
on a slow disk. They do not depend on modification times, folders and formats.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from localctl.data.bad_rows import BadRow
from localctl.data.rows import Rows
from localctl.seeding import key_seed

COUNT, NAMES, CAPTIONS = "number of examples", "names of the examples", "captions"
LOOKED_AT = 256  # rows whose files are read: if 1 % of a large dataset differ, this is noticed with probability 0.92
_PIECE = 16 * 1024  # bytes read at the beginning, in the middle and at the end of a file
_UNUSABLE = b"unusable"


def fingerprints(rows: Rows, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Return name -> number or sha256 of the rows ``indices`` (ascending) of ``rows``.

    The same content in another folder or format has the same fingerprints. Captions in files of their own are sampled
    like images; otherwise all of them are hashed.
    """
    names = hashlib.sha256()
    for index in indices:
        names.update(rows.keys[index].encode(errors="replace") + b"\0")
    sampled: dict[str, Any] = {name: hashlib.sha256() for name in (CAPTIONS, "images", "condition images", "masks")}
    for place in sample(len(indices)):
        for name, content in zip(sampled, _contents(rows, indices[place]), strict=True):
            sampled[name].update(hashlib.sha256(content).digest())
    result = {COUNT: len(indices), NAMES: names.hexdigest()}
    result |= {name: digest.hexdigest() for name, digest in sampled.items()}
    captions = rows.captions()
    if captions is not None:
        wanted = bytearray(len(rows))
        for index in indices:
            wanted[index] = 1
        result[CAPTIONS] = _digest_of_captions(compress(captions, wanted))
    return result


def sample(count: int) -> Iterator[int]:
    """Yield at most ``LOOKED_AT`` ascending indices below ``count``: one of each equal part, chosen by a hash."""
    parts = min(count, LOOKED_AT)
    for part in range(parts):
        first, last = part * count // parts, (part + 1) * count // parts
        yield first + key_seed(0, "fingerprint", part) % (last - first)


def _digest_of_captions(cells: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for cell in cells:
        # Cells that are no text are hashed as JSON; surrogatepass encodes half surrogate pairs.
        text = cell.strip() if isinstance(cell, str) else json.dumps(cell, default=str)
        digest.update(text.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def _contents(rows: Rows, index: int) -> tuple[bytes, bytes, bytes, bytes]:
    """Read captions, and pieces of image, condition and mask of a row."""
    try:
        row = rows[index]
    except BadRow:
        return _UNUSABLE, _UNUSABLE, _UNUSABLE, _UNUSABLE
    return json.dumps(row.captions).encode(), _pieces(row.image), _pieces(row.condition), _pieces(row.mask)


def _pieces(source: Path | bytes | None) -> bytes:
    """Return size, beginning, middle and end of a file or of its content."""
    if source is None:
        return b"none"
    try:
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):  # reading a pipe would block
            return _UNUSABLE
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            parts = [str(size).encode()]
            for at in (0, max(0, (size - _PIECE) // 2), max(0, size - _PIECE)):
                file.seek(at)
                parts.append(file.read(_PIECE))
    except (OSError, ValueError):
        return _UNUSABLE
    return b"".join(parts)
