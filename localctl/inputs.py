"""Conversion of conditions and masks to tensors: from PIL images, arrays and tensors, single or in a list."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.images import to_gray, to_rgb
from localctl.masks import mask_doubt, stretch_mask

OneImage: TypeAlias = Tensor | np.ndarray | Image.Image
ImageLike: TypeAlias = OneImage | Sequence[OneImage]

_COLOUR_TOLERANCE = 32  # of 255, since JPEG tints gray images slightly
_FIT = "give a PIL image, an array (H, W) or (H, W, C), a tensor (C, H, W), or a list of one kind and size"


class ImageField:
    """A dataclass field that accepts any :data:`ImageLike`, which ``__post_init__`` replaces by a tensor."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Tensor:
        if instance is None:
            raise AttributeError(self.name)  # so that the field has no default
        return vars(instance)[self.name]

    def __set__(self, instance: Any, value: ImageLike) -> None:
        vars(instance)[self.name] = value


class OptionalImageField:
    """As :class:`ImageField`, but the field may be None, which is its default."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Tensor | None:
        return None if instance is None else vars(instance)[self.name]

    def __set__(self, instance: Any, value: ImageLike | None) -> None:
        vars(instance)[self.name] = value


def as_condition(value: Any, channels: int | None = None) -> Tensor:
    """Return a condition as float32 (n,C,H,W) in [0,1].

    Args:
        value: a PIL image; an array (H,W), (H,W,C) or (n,H,W,C); a tensor (C,H,W) or (n,C,H,W); or a list of images,
            one per layout. Values are floats in [0,1] or 8-bit integers.
        channels: to read from a PIL image, 1 or 3; by default 1 for a gray image and 3 for any other.

    Raises:
        ValueError: another shape or type, values outside [0,1], or an image in colour where one channel is required.
    """
    return _batch("condition", value, lambda one: _condition(one, channels))


def as_mask(value: Any, name: str = "mask") -> Tensor:
    """Return a mask as float32 (n,1,H,W) in [0,1], 1 = controlled.

    ``value``: a PIL image (white = controlled, transparent = not); an array (H,W), (H,W,1) or (n,H,W,1); a tensor
    (H,W), (1,H,W) or (n,1,H,W); or a list of masks. PIL images and 8-bit arrays are read like files: a mask of 0 and 1
    is stretched to black and white, and one that looks like a map of labels causes a warning. ``name``: used in
    messages. ValueError for another shape or type, or values outside [0,1].
    """
    mask = _batch(name, value, lambda one: _mask(one, name))
    if mask.shape[1] != 1:
        raise ValueError(f"The {name} must have one channel, not {mask.shape[1]}; give (1, H, W) or (n, 1, H, W).")
    return mask


def _batch(name: str, value: Any, read: Any) -> Tensor:
    if isinstance(value, (list, tuple)) and value:
        items = [_batch(name, item, read) for item in value]
        sizes = dict.fromkeys(tuple(item.shape[1:]) for item in items)
        if len(sizes) > 1:
            raise ValueError(f"The {name}s of a list have the shapes {' and '.join(map(str, sizes))}; give one shape.")
        return torch.cat(items)
    if not isinstance(value, (Tensor, np.ndarray, Image.Image)):
        raise ValueError(f"The {name} is a {type(value).__name__}; {_FIT}.")
    tensor = read(value)
    if tensor.ndim not in (3, 4):
        shape = tuple(getattr(value, "shape", ()))
        form = "(C, H, W) or (n, C, H, W)" if isinstance(value, Tensor) else "(H, W), (H, W, C) or (n, H, W, C)"
        raise ValueError(f"The {name} must be {form}, not {shape}.")
    tensor = _in_float(tensor)
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):  # NaN fails both
        raise ValueError(f"The {name} has values outside [0, 1]; divide 8-bit values by 255.")
    return tensor if tensor.ndim == 4 else tensor[None]


def _condition(value: OneImage, channels: int | None) -> Tensor:
    if isinstance(value, Image.Image):
        return torch.from_numpy(_channels_of(value, channels).transpose(2, 0, 1).copy())
    return _channels_first(value) if isinstance(value, np.ndarray) else value


def _channels_of(image: Image.Image, channels: int | None) -> np.ndarray:
    """Return the image as (H,W,C) uint8, with C = ``channels``."""
    gray = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    if channels not in (None, 1, 3):
        raise ValueError(f"The condition must have {channels} channels, which no PIL image has; give a tensor.")
    rgb = to_rgb(image)
    if (channels or (1 if gray else 3)) == 3:
        return np.asarray(rgb)
    if is_coloured(rgb):
        raise ValueError("The condition is in colour but must have one channel; give a gray image.")
    return np.asarray(rgb.convert("L"))[..., None]


def is_coloured(image: Image.Image) -> bool:
    """Tell whether an RGB image has colours; a slight tint, as JPEG gives a gray image, does not count."""
    return int(np.ptp(np.asarray(image).astype(np.int16), axis=2).max()) > _COLOUR_TOLERANCE


def _mask(value: OneImage, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value[None] if value.ndim == 2 else value
    if isinstance(value, Image.Image):
        return torch.from_numpy(_as_from_file(np.array(to_gray(value)), name))[None]
    if value.ndim == 3 and value.shape[0] == 1 != value.shape[-1]:
        value = value[0]  # (1,H,W)
    if value.dtype == np.uint8 and value.ndim == 2 and value.max(initial=0) > 1:
        return torch.from_numpy(_as_from_file(value.astype(np.float32) / 255, name))[None]
    return _channels_first(value)


def _as_from_file(gray: np.ndarray, name: str) -> np.ndarray:
    """Stretch a mask (H,W) in [0,1] and warn about a doubtful one, as :func:`localctl.masks.load_mask` does."""
    mask, stretched = stretch_mask(gray)
    if problem := stretched or (mask_doubt(mask) if mask.any() else ""):
        warnings.warn(f"The {name} {problem}.", stacklevel=6)
    return mask


def _channels_first(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array, order="C"))
    if tensor.ndim == 2:
        return tensor[None]
    return tensor.movedim(-1, -3) if tensor.ndim in (3, 4) else tensor


def _in_float(tensor: Tensor) -> Tensor:
    """Convert to float32; 8-bit integers are divided by 255, unless all are 0 or 1."""
    levels = 255 if tensor.dtype == torch.uint8 and tensor.numel() and int(tensor.max()) > 1 else 1
    return tensor.detach().float() / levels if levels > 1 else tensor.detach().float()
