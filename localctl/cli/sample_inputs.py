"""What adapters follow in a run of ``sample.py``: photos or ready conditions and masks, of any size, brought to the
size of the run together, by the geometry that training uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.adapter_files import SavedAdapter
from localctl.cli.sample_settings import SampleSettings
from localctl.conditions import ConditionConfig, extract
from localctl.control.base import check_window
from localctl.data.geometry import IMAGE, NEAREST, SMOOTH, Geometry, geometry, same_shape, to_array
from localctl.images import load_image
from localctl.inputs import is_coloured
from localctl.masks import load_mask
from localctl.sizes import SIZE_MULTIPLE, near_side

_SUITS = 4  # an image of up to so many times the base's own area, or of a part that small, is generated at its own size

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class AdapterJob:
    """One adapter with what it shall follow, checked but not loaded."""

    saved: SavedAdapter
    condition: Tensor  # (C, H, W) in [0, 1]
    mask: Tensor  # (1, H, W)
    weight: float
    start: float
    end: float


@dataclass(frozen=True)
class Source:
    """An image as it is in its file: a photo, whose condition is computed as ``condition`` says, or a ready condition.

    mask: (1, h, w) in [0, 1], of any size.
    """

    path: str
    image: Image.Image
    computed: bool
    condition: ConditionConfig | None
    mask_path: str
    mask: Tensor | None

    @property
    def size(self) -> Size:
        return self.image.height, self.image.width


def read_sources(options: SampleSettings, adapters: Sequence[SavedAdapter]) -> list[Source]:
    """What each adapter follows. ValueError for a file that cannot be read, or a condition it does not take."""
    return [_read(options, index, adapter) for index, adapter in enumerate(adapters)]


def _nth(options: SampleSettings, name: str, index: int) -> Any:
    values = getattr(options, name)
    return None if not values else values[0] if len(values) == 1 else values[index]


def _read(options: SampleSettings, index: int, adapter: SavedAdapter) -> Source:
    computed = bool(options.image)
    condition = _condition(_nth(options, "condition", index), adapter, computed)
    path = _nth(options, "image" if computed else "condition_image", index)
    image = load_image(path)
    if not computed:
        image = _ready(image, path, _channels(adapter))
    mask_path = _nth(options, "mask", index)
    return Source(path, image, computed, condition, mask_path, load_mask(mask_path) if mask_path else None)


def _channels(adapter: SavedAdapter) -> int:
    return adapter.config.get("in_channels", 3)  # T2IAdapter's default


def _condition(kind: Any, adapter: SavedAdapter, computed: bool) -> ConditionConfig | None:
    """How to compute the condition; as trained, unless another kind is asked. None: nobody knows, nor needs to."""
    trained = adapter.condition
    kind = kind or (trained.kind if trained else None)
    if kind is None:
        if computed:
            raise ValueError(
                f"The adapter {adapter.name} does not say which condition it was trained on; give --condition."
            )
        return None
    settings = trained if trained and kind == trained.kind else ConditionConfig(kind=kind)
    if settings.channels != _channels(adapter) and not _repeated(settings, adapter):
        raise ValueError(
            f"A {kind} condition has {settings.channels} channels but the adapter {adapter.name} takes "
            f"{_channels(adapter)}; give the --condition it was trained on."
        )
    if computed:
        extract(settings, np.zeros((8, 8, 3), np.uint8))  # ValueError for one that no photo yields
    return settings


def _repeated(condition: ConditionConfig, adapter: SavedAdapter) -> bool:
    """Whether a gray condition goes into all three channels, as published adapters that take an RGB image expect."""
    return (condition.channels, _channels(adapter)) == (1, 3) and adapter.condition is None


def _ready(image: Image.Image, path: str, channels: int) -> Image.Image:
    """A ready condition in as many channels as the adapter takes."""
    if channels not in (1, 3):
        raise ValueError(f"The adapter takes {channels} channels, which no image has; use it from Python.")
    if channels == 3:
        return image
    if is_coloured(image):
        raise ValueError(f"{path} is in colour but the adapter takes 1 channel; give a gray one, or --image.")
    return image.convert("L")


def size_multiple(adapters: Sequence[SavedAdapter]) -> int:
    """Of how many pixels height and width must be multiples, for the base and all adapters."""
    return math.lcm(SIZE_MULTIPLE, *(adapter.config.get("downscale_factor", 8) for adapter in adapters))


def choose_size(asked: tuple[int | None, int | None], source: Size | None, own: Size, multiple: int) -> Size:
    """The size of the run. asked: what the flags or the layout say of it; source: of the image to follow, if any; own:
    of the base.

    An image that suits the base (a multiple on both sides, a quarter to four times the base's area) keeps its size; any
    other comes to the base's area and keeps its shape. ValueError for an asked side that is no multiple.
    """
    height, width = asked
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % multiple:
            raise ValueError(
                f"The {name} {side} is no multiple of {multiple}, which the adapter needs; use "
                f"{near_side(side, multiple)}, for example."
            )
    if height is not None and width is not None:
        return height, width
    tall, wide = source or own
    if height is not None or width is not None:
        if source is None:
            return height or own[0], width or own[1]
        scale = height / tall if height is not None else (width or 0) / wide
        return height or near_side(tall * scale, multiple), width or near_side(wide * scale, multiple)
    area = own[0] * own[1]
    if not (tall % multiple or wide % multiple) and area / _SUITS <= tall * wide <= area * _SUITS:
        return tall, wide
    scale = math.sqrt(area / (tall * wide))
    return near_side(tall * scale, multiple), near_side(wide * scale, multiple)


def check_one_shape(sources: Sequence[Source]) -> None:
    """ValueError for images that a common crop would cut at different places."""
    for source in sources[1:]:
        if not same_shape(source.size, sources[0].size):
            raise ValueError(
                f"The conditions are {_text(sources[0].size)} and {_text(source.size)} pixels, two shapes; crop them "
                "to one, or give --height and --width."
            )


def follow(
    options: SampleSettings, adapters: Sequence[SavedAdapter], sources: Sequence[Source], size: Size, why: str = ""
) -> tuple[list[AdapterJob], list[str]]:
    """Conditions and masks of ``size``, and a sentence, which ends in ``why``, on each image that had another.

    ValueError for a mask of another shape than its image, or of which nothing is left.
    """
    jobs, notes = [], []
    for index, (adapter, source) in enumerate(zip(adapters, sources, strict=True)):
        seen = geometry(source.size, size)
        window = _nth(options, "start", index), _nth(options, "end", index)
        check_window(*window)
        condition, mask = _condition_of(source, seen), _mask_of(source, seen)
        condition = condition.expand(_channels(adapter), -1, -1)
        jobs.append(AdapterJob(adapter, condition, mask, _nth(options, "weight", index), *window))
        if source.size != size:
            cropped = "" if same_shape(source.size, size) else " and cropped"
            notes.append(f"{source.path} is {_text(source.size)} pixels, scaled{cropped} to {_text(size)}{why}.")
            if source.mask is not None and not same_shape(tuple(source.mask.shape[-2:]), source.size):
                notes.append(f"The mask {source.mask_path} has the size of the result and is taken as it is.")
    return jobs, list(dict.fromkeys(notes))


def _condition_of(source: Source, seen: Geometry) -> Tensor:
    """(C,H,W) float32 in [0,1]; an image that has the size stays as it is to the bit."""
    if source.computed:
        assert source.condition is not None
        image = source.image if source.size == seen.size else seen.apply(source.image, IMAGE)
        return extract(source.condition, np.asarray(image))
    nearest = source.condition is not None and source.condition.kind == "segmentation"  # as in training
    image = source.image if source.size == seen.size else seen.apply(source.image, NEAREST if nearest else SMOOTH)
    return torch.from_numpy(to_array(image).transpose(2, 0, 1).copy()).float() / 255


def _mask_of(source: Source, seen: Geometry) -> Tensor:
    """(1,H,W) in [0,1]: the part of the mask that is seen; one of the run's own size stays as it is."""
    if source.mask is None:
        return torch.ones(1, *seen.size)
    there: Size = (source.mask.shape[-2], source.mask.shape[-1])
    if there == seen.size:
        return source.mask
    if not same_shape(there, source.size):
        raise ValueError(
            f"The mask {source.mask_path} is {_text(there)} pixels but the image {source.path} is "
            f"{_text(source.size)}, another shape; save the mask in the image's shape."
        )
    mask = torch.from_numpy(seen.apply_to_mask(source.mask[0].numpy()).clip(0, 1))[None]
    if not mask.any():
        raise ValueError(
            f"Nothing of the mask {source.mask_path} is left in the part of {source.path} that is seen, "
            f"{_text(seen.size)}; choose another --height and --width."
        )
    return mask


def _text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
