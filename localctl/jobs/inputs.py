"""The inputs of adapters in a run of ``sample.py``: photos or conditions, and masks, of any size, scaled and cropped
together to the size of the run, by the geometry that training uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.adapter_files import SavedAdapter
from localctl.condition_models import load_model
from localctl.conditions import ConditionConfig, extract
from localctl.control.base import check_window
from localctl.data.geometry import IMAGE, NEAREST, SMOOTH, Geometry, geometry, same_shape, to_array
from localctl.images import load_image
from localctl.inputs import is_coloured
from localctl.masks import load_mask
from localctl.settings import DEFAULT, MODELS
from localctl.sizes import SIZE_MULTIPLE, near_side

_OF_MODELS = ("condition_model", "condition_detector")
_AREA_FACTOR = 4  # an image of up to 4 times the base's area, or down to a quarter of it, keeps its size

_LEVELS = range(4)  # of a T2IAdapter whose config does not say

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class AdapterJob:
    """One adapter with its condition and mask, checked; its weights are not loaded."""

    saved: Any  # SavedAdapter, or SavedControlNet
    condition: Tensor  # (C, H, W) in [0, 1]
    mask: Tensor  # (1, H, W) in [0, 1]; of a ControlNet, also one for each layout
    weight: float | tuple[float, ...]  # of all levels, or of each
    start: float
    end: float


@dataclass(frozen=True)
class Source:
    """An image as it is in its file: a photo, or a condition that is already computed.

    computed: whether the condition is computed from the image, as ``condition`` says. mask: (1, h, w) in [0, 1], of
    any size.
    """

    path: str
    image: Image.Image
    computed: bool
    condition: ConditionConfig | None
    mask_path: str
    mask: Tensor | None

    @property
    def size(self) -> Size:
        """(height, width) of the image in pixels."""
        return self.image.height, self.image.width


def read_sources(options: Any, adapters: Sequence[Any]) -> list[Source]:
    """Read the image and mask of each adapter or ControlNet; ``options`` has the fields of their inputs. ValueError
    for a file that cannot be read, or a condition that the adapter does not take."""
    return [_read_source(options, index, adapter) for index, adapter in enumerate(adapters)]


def value_for(options: Any, name: str, index: int) -> Any:
    """Return the value of a setting for the adapter with this index; a single value is for all."""
    values = getattr(options, name)
    return None if not values else values[0] if len(values) == 1 else values[index]


def _read_source(options: Any, index: int, adapter: Any) -> Source:
    """Read the image and mask of the adapter with this index."""
    computed = bool(options.image)
    condition = _condition(options, index, adapter)
    path = value_for(options, "image" if computed else "condition_image", index)
    image = load_image(path)
    if not computed:
        image = _with_channels(image, path, _channels(adapter), getattr(options, "prefix", ""))
    mask_path = value_for(options, "mask", index)
    return Source(path, image, computed, condition, mask_path, load_mask(mask_path) if mask_path else None)


def _channels(adapter: Any) -> int:
    """Return how many channels a condition has; 3 is the default of both classes."""
    return adapter.config.get("conditioning_channels", adapter.config.get("in_channels", 3))


def _condition(options: Any, index: int, adapter: Any) -> ConditionConfig | None:
    """Return how to compute the condition: as in training, unless --condition is another. None for an image that is a
    condition already, if the adapter names none."""
    trained, computed = adapter.condition, bool(options.image)
    kind, model, detector = (value_for(options, name, index) for name in ("condition", *_OF_MODELS))
    prefix = getattr(options, "prefix", "")  # of the flags
    what = _kind_of(prefix)
    for name in _OF_MODELS:
        if getattr(options, name) and not computed:
            raise ValueError(
                f"--{prefix}{name} is for conditions that are computed from --{prefix}image; leave it out."
            )
    if trained and kind not in (None, trained.kind) and not computed:
        raise ValueError(
            f"--{prefix}condition {kind} says what to compute from --{prefix}image; the {what} {adapter.name} takes "
            f"--{prefix}condition_image as the {trained.kind} that it was trained on, so leave it out."
        )
    kind = kind or (trained.kind if trained else None)
    if kind is None:
        if computed:
            raise ValueError(
                f"The {what} {adapter.name} does not say which condition it was trained on; give --{prefix}condition."
            )
        return None
    settings = trained if trained and kind == trained.kind else ConditionConfig(kind=kind)
    if computed and kind in MODELS:
        model = model or settings.model or DEFAULT
        settings = replace(settings, model=model, detector=detector or settings.detector)
    elif model or detector:
        given = "condition_model" if model else "condition_detector"
        raise ValueError(f"A {kind} condition is computed without a model; leave --{prefix}{given} out.")
    if settings.channels != _channels(adapter) and not _is_repeated(settings, adapter):
        raise ValueError(
            f"A {kind} condition has {settings.channels} channels but the {what} {adapter.name} takes "
            f"{_channels(adapter)}; give the --{prefix}condition it was trained on."
        )
    if computed and settings.model is not None:
        load_model(settings, bool(options.local_files_only))
    elif computed:
        extract(settings, np.zeros((8, 8, 3), np.uint8))  # ValueError for one that cannot be computed
    return settings


def _is_repeated(condition: ConditionConfig, adapter: Any) -> bool:
    """Tell whether to repeat a gray condition in three channels, as published adapters that take RGB images expect."""
    return (condition.channels, _channels(adapter)) == (1, 3) and adapter.condition is None


def _kind_of(prefix: str) -> str:
    """Return what takes the inputs of the flags with this prefix."""
    return "ControlNet" if prefix else "adapter"


def _with_channels(image: Image.Image, path: str, channels: int, prefix: str) -> Image.Image:
    """Return a condition, an RGB image, with as many channels as the adapter takes. ValueError for colours where that
    is one."""
    what = _kind_of(prefix)
    if channels not in (1, 3):
        raise ValueError(f"The {what} takes {channels} channels, which no image has; pass a tensor from Python.")
    if channels == 3:
        return image
    if is_coloured(image):
        raise ValueError(
            f"{path} is in colour but the {what} takes 1 channel; give a gray image, or use --{prefix}image."
        )
    return image.convert("L")


def size_multiple(adapters: Sequence[SavedAdapter], of_base: int = SIZE_MULTIPLE) -> int:
    """Return the number of pixels that height and width must be multiples of, for the base and all adapters."""
    return math.lcm(SIZE_MULTIPLE, of_base, *(adapter.config.get("downscale_factor", 8) for adapter in adapters))


def choose_size(
    asked: tuple[int | None, int | None], source: Size | None, own: Size, multiple: int, needed_by: str = "adapter"
) -> Size:
    """Choose the (height, width) of the run in pixels.

    An image that suits the base (multiples on both sides, a quarter to four times the base's area) keeps its size; any
    other is scaled to about the base's area and keeps its aspect ratio.

    Args:
        asked: by flags or layout; None for a side left open.
        source: size of the image to follow, if any.
        own: size of the base.
        multiple: both sides are multiples of it. needed_by: what needs that, in the error sentence.

    Raises:
        ValueError: a side that was asked for is not a multiple.
    """
    height, width = asked
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % multiple:
            raise ValueError(
                f"The {name} {side} is not a multiple of {multiple}, which the {needed_by} needs; use "
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
    if not (tall % multiple or wide % multiple) and area / _AREA_FACTOR <= tall * wide <= area * _AREA_FACTOR:
        return tall, wide
    scale = math.sqrt(area / (tall * wide))
    return near_side(tall * scale, multiple), near_side(wide * scale, multiple)


def check_same_aspect_ratio(sources: Sequence[Any]) -> None:
    """Raise a ValueError for images (anything with a ``size``) of different aspect ratios, which one crop would cut at
    different places."""
    for source in sources[1:]:
        if not same_shape(source.size, sources[0].size):
            raise ValueError(
                f"The conditions are {size_text(sources[0].size)} and {size_text(source.size)} pixels, two aspect "
                "ratios; crop them to one, or give --height and --width."
            )


def prepare_inputs(
    options: Any, adapters: Sequence[Any], sources: Sequence[Source], size: Size, why: str = ""
) -> tuple[list[AdapterJob], list[str]]:
    """Return each adapter with its condition and mask of ``size``, and a note on each image that had another size,
    which ends in ``why``.

    ValueError for a mask of another aspect ratio than its image, or one that is empty after cropping.
    """
    jobs, notes = [], []
    for index, (adapter, source) in enumerate(zip(adapters, sources, strict=True)):
        crop = geometry(source.size, size)
        window = value_for(options, "start", index), value_for(options, "end", index)
        check_window(*window)
        condition, mask = _condition_of(source, crop), _mask_of(source, crop)
        condition = condition.expand(_channels(adapter), -1, -1)
        jobs.append(AdapterJob(adapter, condition, mask, value_for(options, "weight", index), *window))
        if source.size != size:
            cropped = "" if same_shape(source.size, size) else " and cropped"
            notes.append(
                f"{source.path} is {size_text(source.size)} pixels, scaled{cropped} to {size_text(size)}{why}."
            )
            if source.mask is not None and not same_shape(tuple(source.mask.shape[-2:]), source.size):
                notes.append(f"The mask {source.mask_path} has the size of the result and is used as it is.")
    return jobs, list(dict.fromkeys(notes))


def with_level_weights(options: Any, jobs: Sequence[AdapterJob]) -> list[AdapterJob]:
    """Return the adapters with a weight for each of their levels, where ``--level_weights`` gives them. ValueError for
    another number of weights than levels."""
    weighted = list(jobs)
    for index, job in enumerate(jobs):
        text = value_for(options, "level_weights", index)
        if text is None:
            continue
        try:
            weights = [float(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(
                f"--level_weights are numbers joined by commas, such as 1,1,0.5,0, not {text!r}."
            ) from None
        levels = len(job.saved.config.get("channels", _LEVELS))
        if len(weights) != levels or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"--level_weights {text!r} must be {levels} finite numbers, one for each level of the adapter "
                f"{job.saved.name}, finest first."
            )
        assert isinstance(job.weight, float)
        weighted[index] = replace(job, weight=tuple(job.weight * weight for weight in weights))
    return weighted


def _condition_of(source: Source, crop: Geometry) -> Tensor:
    """Return the condition (C,H,W), float32 in [0,1]; an image of the run's size is not resampled."""
    if source.computed:
        assert source.condition is not None
        image = source.image if source.size == crop.size else crop.apply(source.image, IMAGE)
        return extract(source.condition, np.asarray(image))
    nearest = source.condition is not None and source.condition.kind == "segmentation"  # as in training
    image = source.image if source.size == crop.size else crop.apply(source.image, NEAREST if nearest else SMOOTH)
    return torch.from_numpy(to_array(image).transpose(2, 0, 1).copy()).float() / 255


def _mask_of(source: Source, crop: Geometry) -> Tensor:
    """Return the mask (1,H,W) in [0,1], cropped as its image; one of the run's size is not changed."""
    if source.mask is None:
        return torch.ones(1, *crop.size)
    size: Size = (source.mask.shape[-2], source.mask.shape[-1])
    if size == crop.size:
        return source.mask
    if not same_shape(size, source.size):
        raise ValueError(
            f"The mask {source.mask_path} is {size_text(size)} pixels but the image {source.path} is "
            f"{size_text(source.size)}, another aspect ratio; save the mask with the image's."
        )
    mask = torch.from_numpy(crop.apply_to_mask(source.mask[0].numpy()).clip(0, 1))[None]
    if not mask.any():
        raise ValueError(
            f"The mask {source.mask_path} is black everywhere in the part of {source.path} that remains, "
            f"{size_text(crop.size)}; choose another --height and --width."
        )
    return mask


def size_text(size: Size) -> str:
    """Return WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"
