"""Examples from files: decoded within limits, checked, split, and brought to the training size together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.condition_models import load_model
from localctl.conditions import ConditionConfig, extract
from localctl.data.bad_rows import BadRow
from localctl.data.bucket_sizes import Size
from localctl.data.buckets import Buckets, assign
from localctl.data.config import DataConfig
from localctl.data.fingerprint import fingerprints
from localctl.data.geometry import IMAGE, NEAREST, SMOOTH, Geometry, geometry, same_shape, sample_geometry, to_array
from localctl.data.held_out import held_out
from localctl.data.local_rows import FolderRows, ImageFolderRows
from localctl.data.plan import SampleRef
from localctl.data.rows import Row, Rows
from localctl.data.sample import Example, Source
from localctl.data.tables import open_table
from localctl.files import first_line
from localctl.images import ImageError, Limits, read_photo
from localctl.labels import shorten
from localctl.masks import mask_doubt, stretch_mask
from localctl.seeding import key_seeds, numpy_rng

SPLITS = ("train", "val")
WITHOUT_VALIDATION = " or pass --validation_steps 0"  # advice of training when there are no held-out examples
_CHECKED_MASKS = 4  # when data is opened
_ENOUGH = 16  # examples of a bucket among which a usable one can be expected


@dataclass(frozen=True)
class Parts:
    """A decoded row, each image at its own size, or reduced if it has over 16 million pixels.

    image: RGB. condition: RGB, or mode F in [0,1]. mask: (h,w) float32 in [0,1], 1 = controlled. size: (height, width)
    of the image's file. stretched: a clause on how the mask was stretched, if its white is 1 and not 255; else "".
    """

    key: str
    image: Image.Image
    condition: Image.Image | None
    mask: np.ndarray | None
    captions: tuple[str, ...]
    size: tuple[int, int]
    stretched: str = ""


class FileSource:
    """The rows ``indices`` of ``rows`` as examples of ``data.size``, or each of the size of its bucket.

    ``source[i]`` is always the central crop of image i; ``visit`` crops and mirrors as the settings say. Both raise
    BadRow, with the reason, for a row that cannot be used. note: a clause on how the rows were chosen, or "". buckets:
    of the examples; None = all have the same size.
    """

    def __init__(
        self,
        rows: Rows,
        indices: Sequence[int] | np.ndarray,
        data: DataConfig,
        condition: ConditionConfig,
        note: str = "",
    ) -> None:
        self.rows, self.note = rows, note
        self.indices = np.asarray(indices, np.int64)  # which worker processes share, unlike a list
        self.buckets: Buckets | None = None
        self.data, self.condition = data, condition
        nearest = data.conditioning_interpolation == "nearest" or (
            data.conditioning_interpolation is None and condition.kind == "segmentation"
        )
        sizes = data.buckets or (data.size,)
        self._cover = (max(height for height, _ in sizes), max(width for _, width in sizes))
        self._condition_filter = NEAREST if nearest else SMOOTH

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        parts = self.read(index)
        return self.example(parts, geometry(parts.size, self.size(index)), parts.captions[0])

    def key(self, index: int) -> str:
        """Return the permanent name of example ``index``."""
        return self.rows.keys[int(self.indices[index])]

    def size(self, index: int) -> Size:
        """Return the (height, width) to which example ``index`` is brought."""
        return self.data.size if self.buckets is None else self.buckets.size(index)

    def in_buckets(self, images: np.ndarray) -> FileSource:
        """Return the examples in the buckets of ``data``, without those that are too small for all of them.

        images: (height, width) of each image, (n,2); 0 = unknown. ValueError when no image fits.
        """
        sizes, most = self.data.buckets, self.data.max_upscaling
        of = assign(images, sizes, most)
        small = np.flatnonzero(of < 0)
        note = self.note
        if len(small):
            height, width = images[small[0]].tolist()
            left_out = (
                f"{len(small)} of {len(self)} images are too small for all of data.aspect_ratio_buckets with "
                f"data.max_upscaling={most:g}, such as {shorten(self.key(int(small[0])))} ({width}x{height})"
            )
            if len(small) == len(self):
                raise ValueError(f"{left_out}; choose smaller buckets, or raise data.max_upscaling.")
            note = "; ".join(filter(None, (note, f"{left_out}; these are left out")))
        fits = np.flatnonzero(of >= 0)
        source = FileSource(self.rows, self.indices[fits], self.data, self.condition, note)
        source.buckets = Buckets(sizes, of[fits])
        return source

    def another(self, index: int, rng: np.random.Generator) -> int:
        """Choose a replacement for the bad example ``index``: of the same bucket, unless that has few examples."""
        if self.buckets is not None:
            members = self.buckets.members(int(self.buckets.of[index]))
            if len(members) >= _ENOUGH:
                return int(members[rng.integers(len(members))])
        return int(rng.integers(len(self)))

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Hashes of names, captions and files, see :func:`localctl.data.fingerprint.fingerprints`."""
        found = fingerprints(self.rows, self.indices)
        return found if self.buckets is None else found | {"aspect-ratio buckets": self.buckets.digest()}

    def visit(self, ref: SampleRef, seed: int) -> Example:
        """Return example ``ref.sample`` of epoch ``ref.epoch``: crop, flip and the choice among several captions are
        sampled from (seed, epoch, key)."""
        parts = self.read(ref.sample)
        rng = numpy_rng(seed, "geometry", ref.epoch, parts.key)
        size = ref.size or self.size(ref.sample)
        crop = sample_geometry(parts.size, size, rng, self.data.center_crop, self.data.random_flip)
        return self.example(parts, crop, chosen_caption(parts.captions, seed, ref.epoch, parts.key))

    def read(self, index: int) -> Parts:
        """Read and decode row ``index``. BadRow when a part is missing, damaged, or of another shape than the image."""
        key = self.key(index)
        try:
            return self._read(key, self.rows[int(self.indices[index])])
        except BadRow as bad:
            raise BadRow(bad.reason, str(bad), key) from None
        except OSError as error:  # the disk fails, at any point
            raise BadRow("row unreadable", f"the row cannot be read ({first_line(error)})", key) from None

    def _read(self, key: str, row: Row) -> Parts:
        image, size = self._decoded("image", key, row.image)
        condition = None
        if row.condition is not None:
            whole = self._condition_filter == NEAREST  # labels must not be blended
            gray = self.condition.channels == 1
            condition, own = self._decoded("condition", key, row.condition, gray, whole)
            _check_shape("condition", own, size)
        mask, stretched = None, ""
        if row.mask is not None:
            mask, stretched, own = self._mask(key, row.mask)
            _check_shape("mask", own, size)
        return Parts(key, image, condition, mask, row.captions, size, stretched)

    def mask_oddity(self, index: int) -> str:
        """Return a clause on what is odd about the mask of row ``index``, or ""; decodes nothing but the mask."""
        row = self.rows[int(self.indices[index])]
        if row.mask is None:
            return ""
        mask, stretched, _ = self._mask(self.key(index), row.mask)
        return stretched or mask_doubt(mask)

    def _mask(self, key: str, source: Path | bytes) -> tuple[np.ndarray, str, tuple[int, int]]:
        """Return ``mask`` and ``stretched`` of :class:`Parts`, and the file's own (height, width)."""
        values, own = self._decoded("mask", key, source, gray=True)
        return *stretch_mask(np.asarray(values)), own

    def _decoded(
        self, what: str, key: str, source: Path | bytes, gray: bool = False, whole: bool = False
    ) -> tuple[Image.Image, tuple[int, int]]:
        """Decode to RGB, or to mode F in [0,1] if ``gray``; return also the file's own (height, width)."""
        limits = Limits(self.data.max_pixels, None if whole else self._cover)
        try:
            return read_photo(source, f"the {what} of {shorten(key)}", limits, gray)
        except ImageError as error:
            raise BadRow(f"{what} {error.reason}", str(error).rstrip(".")) from None

    def example(self, parts: Parts, crop: Geometry, caption: str) -> Example:
        """Apply the geometry ``crop`` to ``parts``; edges and palette are computed from the cropped image."""
        image = np.array(crop.apply(parts.image, IMAGE))  # (H,W,3) uint8
        if parts.condition is None:
            condition = extract(self.condition, image)
        else:
            condition = _unit(crop.apply(parts.condition, self._condition_filter))
        return Example(
            key=parts.key,
            pixels=torch.from_numpy(image).permute(2, 0, 1).contiguous() / 127.5 - 1,
            condition=condition,
            caption=caption,
            mask=None if parts.mask is None else torch.from_numpy(crop.apply_to_mask(parts.mask).clip(0, 1))[None],
            view=crop.view,
            original=(*parts.size, *crop.origin(parts.size)),
        )


def chosen_caption(captions: Sequence[str], seed: int, epoch: int, key: str) -> str:
    """Return the caption of an example in an epoch, sampled if it has several."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(numpy_rng(seed, "caption", epoch, key).integers(len(captions)))]


def open_data(
    data: DataConfig,
    condition: ConditionConfig,
    split: str,
    count: int | None = None,
    *,
    keep: bool = True,
    or_else: str = "",
) -> Source:
    """Open the training or validation part of ``data``, the embedded scenes or files.

    Args:
        split: ``train`` or ``val``; for the embedded scenes also ``test``.
        count, keep: for the embedded scenes, see :class:`localctl.data.micro.MicroScenes`; count None: ``data.count``.
        or_else: see :func:`open_files`.

    Raises:
        ValueError: the data cannot be opened, or the part is empty.
    """
    if not data.is_micro:
        return open_files(data, condition, split, or_else)
    from localctl.data.micro import MicroScenes  # only if asked for: it loads the toy base

    return MicroScenes(split, data.profile, count or data.count or 1, condition, keep)


def open_files(data: DataConfig, condition: ConditionConfig, split: str, or_else: str = "") -> FileSource:
    """Open the ``train`` or ``val`` part of files. ValueError when it cannot be opened or is empty.

    or_else: the end of that error's advice, if the caller can do without a ``val`` part.
    """
    own_split = data.validation_split if split == "val" else None
    return part_of(open_rows(data, condition, own_split or data.split), data, condition, split, or_else)


def part_of(rows: Rows, data: DataConfig, condition: ConditionConfig, split: str, or_else: str = "") -> FileSource:
    """Open a part as :func:`open_files` does, from the ``rows`` of its split, already read."""
    assert split in SPLITS
    indices, note = np.arange(len(rows)), ""
    if data.validation_split is None:
        held, note = held_out(rows.keys, data.validation_share, rows.places)
        indices = np.flatnonzero(held == (split == "val"))
    if split == "train" and data.count is not None and len(indices) > data.count:
        order = np.fromiter(key_seeds(0, "subset", (rows.keys[i] for i in indices.tolist())), np.int64)
        indices = np.sort(indices[np.argsort(order, kind="stable")[: data.count]])
    if not len(indices):
        way_out = "lower it"
        if split == "val":
            own = len(set(rows.keys)) > 1
            way_out = f"{'raise data.validation_share' if own else 'add a second example'}{or_else}"
        raise ValueError(
            f"None of the {len(rows)} rows of {data.path or data.name} falls into the {split} part with "
            f"data.validation_share={data.validation_share:g}; {way_out}."
        )
    if condition.model is not None:
        load_model(condition)  # now, and shared with the data workers, which are forked
    source = FileSource(rows, indices, data, condition, note)
    _warn_of_odd_masks(source)
    return source


def _warn_of_odd_masks(source: FileSource) -> None:
    """Warn once if one of a few masks of the data was stretched or looks like a map of labels."""
    if not source.rows.has_masks:
        return
    for index in dict.fromkeys(np.linspace(0, len(source) - 1, _CHECKED_MASKS).astype(int).tolist()):
        with suppress(BadRow, OSError):  # reported when the row is used
            if oddity := source.mask_oddity(index):
                text = f"The mask of {source.key(index)} in the data {oddity}; others may do so, too."
                return warnings.warn(text, stacklevel=3)


def open_rows(data: DataConfig, condition: ConditionConfig, split: str) -> Rows:
    """Open all rows of ``split``. ValueError when the data cannot be opened."""
    assert not data.is_micro
    data.check_place()
    in_folders = data.name == "folder"
    column = data.conditioning_image_column or (condition.kind if in_folders else "conditioning_image")
    wanted = {
        "image": "original" if in_folders and data.image_column == "image" else data.image_column,
        "condition": None if condition.from_image else column,
        "mask": data.mask_column,
        "caption": "caption" if in_folders and data.caption_column == "text" else data.caption_column,
        "key": data.key_column,
    }
    columns = {what: name for what, name in wanted.items() if name is not None}
    if data.name not in ("imagefolder", "folder"):
        return open_table(data, split, columns)
    assert data.path is not None
    kind = FolderRows if in_folders else ImageFolderRows
    return kind(Path(data.path).expanduser(), columns, split)


def _check_shape(what: str, found: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise a BadRow unless the two (h, w) have the same aspect ratio."""
    if not same_shape(found, image):
        detail = f"the {what} is {found[1]}x{found[0]}, another shape than the image's {image[1]}x{image[0]}"
        raise BadRow(f"{what} of another shape", detail)


def _unit(image: Image.Image) -> Tensor:
    """Convert an image to (C,H,W) float32 in [0,1]."""
    array = to_array(image)
    values = torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()
    return values / 255 if values.dtype == torch.uint8 else values.clamp(0, 1)
