"""A dataset with its encodings: each example comes with what the frozen networks computed of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localctl.data.bad_rows import BadRow
from localctl.data.files import FileSource, chosen_caption
from localctl.data.plan import SampleRef
from localctl.data.sample import Example, Source
from localctl.encodings.codec import unpack, unpack_text
from localctl.encodings.store import DamagedRow, EncodedRow, Store, hashed
from localctl.files import first_line
from localctl.prompt_embeds import PromptEmbeds

REDO = "run `localctl cache` with the same flags, which finds and redoes such rows"


def visited(source: Source, ref: SampleRef, seed: int) -> Example:
    """Return the example of an epoch, of a dataset with or without augmentation. BadRow if it cannot be used."""
    visit = getattr(source, "visit", None)
    return source[ref.sample] if visit is None else visit(ref, seed)


def image_id(key: str, variant: int) -> bytes:
    """Return the id of a variant of an image, and of its condition and mask."""
    return hashed("image", key, str(variant))


def caption_id(caption: str) -> bytes:
    """Return the id of a caption; the same caption is encoded once."""
    return hashed("caption", caption)


def content_of(source: Source, index: int, example: Example | None = None) -> bytes:
    """Return 16 bytes that identify what an image is made of: its file, or, without files, its pixels. BadRow if it
    cannot be read."""
    if isinstance(source, FileSource):
        return _content(source.key(index), source.rows[int(source.indices[index])].image)
    return hashed((example or source[index]).pixels.numpy().tobytes())


def files_of(source: FileSource, index: int) -> bytes:
    """Return 16 bytes that identify the files of image, condition and mask of a row."""
    row, key = source.rows[int(source.indices[index])], source.key(index)
    parts = (row.image, row.condition, row.mask)
    return hashed(*(b"" if part is None else _content(key, part) for part in parts))


def _content(key: str, part: Path | bytes) -> bytes:
    try:
        return hashed(part if isinstance(part, bytes) else part.read_bytes())
    except OSError as error:
        raise BadRow("row unreadable", f"the row cannot be read ({first_line(error)})", key) from None


@dataclass(frozen=True)
class Stores:
    """The encodings of a dataset. conditions: None = conditions and masks are computed while training."""

    images: Store
    captions: Store
    conditions: Store | None = None

    @property
    def variants(self) -> int:
        """How many epochs differ from each other."""
        return self.images.manifest.variants


class EncodedSource:
    """The examples of ``inner``, with their encodings. ``visit`` returns for an epoch the variant ``epoch % variants``.

    BadRow if a row is not stored, is damaged, or was encoded from another file. varies: whether images are cropped or
    flipped at random, so that each variant has an encoding of its own.
    """

    def __init__(self, inner: Source, stores: Stores, varies: bool) -> None:
        self.inner, self.stores, self.varies = inner, stores, varies

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def folder(self) -> Path:
        """The folder of all encodings."""
        return self.stores.images.folder.parents[1]

    def __getitem__(self, index: int) -> Example:
        return self.inner[index]

    def another(self, index: int, rng: np.random.Generator) -> int:
        """Choose a replacement for the bad example ``index``: of the same bucket, as it is encoded at that size."""
        buckets = getattr(self.inner, "buckets", None)
        if buckets is None:
            return int(rng.integers(len(self)))
        members = buckets.members(int(buckets.of[index]))
        return int(members[rng.integers(len(members))])

    @property
    def empty_text(self) -> PromptEmbeds:
        """The embeddings of an empty caption. ValueError if they are damaged."""
        return self._text("")

    def visit(self, ref: SampleRef, seed: int) -> Example:
        """Return an example with its encodings."""
        variant = ref.epoch % self.stores.variants
        place = ref._replace(epoch=variant)
        key = key_of(self.inner, ref.sample)
        number = variant if self.varies else 0
        images = self._row(self.stores.images, image_id(key, number), key)
        if ref.size is not None and list(ref.size) != images.about["size"]:
            raise BadRow("encoded at another size", "it would replace an image of another bucket", key)
        if self.stores.conditions is None:
            example = visited(self.inner, place, seed)
            if images.content != content_of(self.inner, ref.sample, example):
                raise BadRow("encoding outdated", f"the image has changed since it was encoded; {REDO}", key)
        else:
            example = self._stored(key, images, place, seed, number)
        moments = _needed(unpack(images.about, images.payload)["moments"])
        return replace(example, moments=moments, text=self._text(example.caption, key))

    def _stored(self, key: str, images: EncodedRow, ref: SampleRef, seed: int, number: int) -> Example:
        """Return an example from the stores alone; its pixels have the right size, but are all 0."""
        assert isinstance(self.inner, FileSource) and self.stores.conditions is not None
        row = self._row(self.stores.conditions, image_id(key, number), key)
        found = unpack(row.about, row.payload)
        condition = _needed(found["condition"])
        captions = self.inner.rows[int(self.inner.indices[ref.sample])].captions
        return Example(
            key=key,
            pixels=torch.zeros((), dtype=torch.uint8).expand(3, *condition.shape[-2:]),
            condition=condition,
            caption=chosen_caption(captions, seed, ref.epoch, key),
            mask=found["mask"],
            view=images.about["view"],
            original=tuple(images.about["original"]),
        )

    def _text(self, caption: str, key: str = "the empty caption") -> PromptEmbeds:
        row = self._row(self.stores.captions, caption_id(caption), key, "caption")
        return unpack_text(row.about, row.payload)

    def _row(self, store: Store, id: bytes, key: str, what: str = "image") -> EncodedRow:
        try:
            row = store.get(id)
        except DamagedRow as error:
            raise BadRow("encoding damaged", f"{first_line(error)}; {REDO}", key) from None
        if row is None:
            raise BadRow(f"{what} not encoded", f"its {what} is not in {store.folder}; {REDO}", key)
        return row


def _needed(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def key_of(source: Any, index: int) -> str:
    """Return the permanent name of example ``index``."""
    return str(source.key(index))


def image_ids(source: Source, variants: Sequence[int]) -> Iterator[tuple[bytes, int, int]]:
    """Yield (id, index, variant) of all images of a dataset, in order."""
    for index in range(len(source)):
        key = key_of(source, index)
        for variant in variants:
            yield image_id(key, variant), index, variant
