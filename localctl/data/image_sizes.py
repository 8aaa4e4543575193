"""Sizes of all images of a dataset, from its columns ``width`` and ``height``, or from the headers of the files.

Headers are read once: the sizes are stored beside the run. Several processes share the work.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from localctl.data.bad_rows import BadRow
from localctl.data.fingerprint import sample
from localctl.data.rows import Rows
from localctl.files import write_bytes
from localctl.images import ImageError, Limits, photo_size

SIZES = "image_sizes.npz"
_THREADS = 16  # reading headers waits for the disk
_AT_ONCE = 1024


def image_sizes(
    rows: Rows,
    indices: np.ndarray,
    pixels: int,
    place: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[list[Any]], list[Any]] = lambda items: items,
) -> np.ndarray:
    """Return the (height, width) of the images of the rows ``indices``, (n,2) int32; 0 where it is unknown, as for a
    damaged file.

    Args:
        pixels: images with more are refused.
        place: folder in which the sizes are stored; None = nowhere. OSError if it cannot be written to.
        rank, world_size, gather: of several processes, each reads a share, and ``gather`` concatenates the lists of
            all.
    """
    known = rows.sizes()
    if known is not None:
        return known[indices]
    limits = Limits(pixels)
    file = None if place is None else place / SIZES
    names = _digest(rows.keys, indices)
    found = None if file is None else _stored(file, names)
    if found is not None and not _same(rows, indices, found, limits):
        found = None
    if all(gather([found is not None])):
        assert found is not None
        return found
    mine = _read(rows, indices[rank::world_size], limits, shown=rank == 0)
    found = np.empty((len(indices), 2), np.int32)
    for first, part in enumerate(gather([mine])):
        found[first::world_size] = part
    if file is not None and rank == 0:
        _store(file, names, found)
    return found


def _read(rows: Rows, indices: np.ndarray, limits: Limits, shown: bool) -> np.ndarray:
    """Read the headers of the images ``indices``, with a progress bar on stderr if ``shown``."""
    found = np.zeros((len(indices), 2), np.int32)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(indices), desc="image sizes", unit="image", mininterval=1, disable=not shown or None) as bar,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ``limits`` are stricter
        for first in range(0, len(indices), _AT_ONCE):
            part = indices[first : first + _AT_ONCE].tolist()
            found[first : first + len(part)] = list(pool.map(lambda index: _size(rows, index, limits), part))
            bar.update(len(part))
    return found


def _size(rows: Rows, index: int, limits: Limits) -> tuple[int, int]:
    try:
        return photo_size(rows.image(index), "the image", limits)
    except (BadRow, ImageError, OSError):  # reported when the row is used
        return 0, 0


def _same(rows: Rows, indices: np.ndarray, found: np.ndarray, limits: Limits) -> bool:
    """Return whether a seeded sample of the images still has the sizes ``found``."""
    places = np.fromiter(sample(len(indices)), np.int64)
    return bool((_read(rows, indices[places], limits, shown=False) == found[places]).all())


def _digest(keys: Sequence[str], indices: np.ndarray) -> str:
    digest = hashlib.sha256()
    for index in indices.tolist():
        digest.update(keys[index].encode(errors="replace") + b"\0")
    return digest.hexdigest()


def _stored(file: Path, names: str) -> np.ndarray | None:
    """Return the sizes in ``file`` if they are of images with this digest of names; else None."""
    try:
        with np.load(file) as content:
            return content["sizes"].astype(np.int32) if str(content["names"]) == names else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing or damaged: they are read again
        return None


def _store(file: Path, names: str, sizes: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, sizes=sizes, names=np.array(names))
    write_bytes(file, buffer.getvalue())
