"""What a data set holds, in a few short texts, so that another one under the same names is noticed.

All names and captions, which are in memory, and the files of a keyed sample of the rows, which may lie on a slow disk.
Times of files, folders and formats do not count.
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

from localctl.data.bad_rows import BadRow
from localctl.data.rows import Rows
from localctl.seeding import key_seed

COUNT, NAMES, CAPTIONS = "number of examples", "names of the examples", "captions"
LOOKED_AT = 256  # rows whose files are opened: if one in a hundred is another, this is seen 92 times of 100
_PIECE = 16 * 1024  # bytes read at the beginning, in the middle and at the end of a file
_UNUSABLE = b"unusable"


def fingerprints(rows: Rows, indices: Sequence[int]) -> dict[str, Any]:
    """Take name -> number or sha256 of the rows ``indices`` (ascending) of ``rows``; the same for the same content in
    another folder or format. The captions are all of them, but a sample where each is a file of its own."""
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
    """Choose at most ``LOOKED_AT`` places below ``count``, ascending: one out of each equal part, chosen by a hash."""
    parts = min(count, LOOKED_AT)
    for part in range(parts):
        first, last = part * count // parts, (part + 1) * count // parts
        yield first + key_seed(0, "fingerprint", part) % (last - first)


def _digest_of_captions(cells: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for cell in cells:
        # Half a surrogate pair has no bytes of its own. What is no text at all is told apart, too.
        text = cell.strip() if isinstance(cell, str) else json.dumps(cell, default=str)
        digest.update(text.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def _contents(rows: Rows, index: int) -> tuple[bytes, bytes, bytes, bytes]:
    """Read captions, and pieces of image, condition and mask, of a row."""
    try:
        row = rows[index]
    except BadRow:
        return _UNUSABLE, _UNUSABLE, _UNUSABLE, _UNUSABLE
    return json.dumps(row.captions).encode(), _pieces(row.image), _pieces(row.condition), _pieces(row.mask)


def _pieces(source: Path | bytes | None) -> bytes:
    """Read size, beginning, middle and end of a file, or of the bytes of one."""
    if source is None:
        return b"none"
    try:
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):  # a pipe would wait for ever
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
