"""The captions that a training will meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from localctl.data.bad_rows import BadRow
from localctl.data.files import FileSource, chosen_caption
from localctl.data.rows import captions_of
from localctl.data.sample import Source
from localctl.encodings.source import image_id, key_of
from localctl.encodings.store import Store


def captions_of_all(source: Source, seed: int, variants: int, images: Path) -> Iterator[str]:
    """Yield the empty caption and those of ``variants`` epochs, in the order of the rows; some several times.

    images: folder of the encoded images, where the captions of scenes are recorded. Rows without a usable caption are
    left out: their images cannot be used either.
    """
    yield ""
    yield from (
        _of_files(source, seed, variants) if isinstance(source, FileSource) else _of_scenes(source, Store(images))
    )


def _of_files(source: FileSource, seed: int, variants: int) -> Iterator[str]:
    for index, captions in each_caption(source):
        for epoch in range(variants if len(captions) > 1 else 1):
            yield chosen_caption(captions, seed, epoch, source.key(index))


def each_caption(source: FileSource) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the number and the captions of every example that has usable ones."""
    column = source.rows.captions()
    if column is None:
        for index, row in enumerate(source.indices):
            try:
                yield index, source.rows[int(row)].captions
            except (BadRow, OSError):
                continue
        return
    places = np.full(len(source.rows), -1)
    places[np.asarray(source.indices)] = np.arange(len(source))
    for place, cell in zip(places, column, strict=True):
        if place >= 0:
            try:
                yield int(place), captions_of(cell)
            except BadRow:
                continue


def _of_scenes(source: Source, images: Store) -> Iterator[str]:
    for index in range(len(source)):
        row = images.get(image_id(key_of(source, index), 0))
        if row is not None:
            yield row.about["caption"]
