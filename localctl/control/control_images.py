"""Conditions and masks as controls are given them: one for all layouts, or one each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from localctl.layout import Layout


def batched(name: str, tensor: Tensor) -> Tensor:
    """(C,H,W) or (n,C,H,W) as float32 (n,C,H,W). ValueError for another shape, or values outside [0,1]."""
    if tensor.ndim not in (3, 4):
        raise ValueError(f"The {name} must be (C, H, W) or (n, C, H, W), not {tuple(tensor.shape)}.")
    tensor = tensor.detach().float()
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):  # NaN fails both
        raise ValueError(f"The {name} has values outside [0, 1]; divide 8-bit values by 255.")
    return tensor if tensor.ndim == 4 else tensor[None]


def check_mask(mask: Tensor, condition: Tensor) -> None:
    """ValueError unless ``mask`` is (n,1,H,W), of the size of ``condition`` (n,C,H,W)."""
    if mask.shape[1] != 1:
        raise ValueError(f"A mask has one channel, not {mask.shape[1]}; give (1, H, W) or (n, 1, H, W).")
    if mask.shape[-2:] != condition.shape[-2:]:
        raise ValueError(
            f"The mask is {mask.shape[-1]}x{mask.shape[-2]} pixels but the condition is "
            f"{condition.shape[-1]}x{condition.shape[-2]}; they must be of one size."
        )


def check_counts(condition: Tensor, mask: Tensor, layouts: Sequence[Layout]) -> None:
    """ValueError unless there is one condition and one mask for all layouts, or one each."""
    for name, tensor in (("condition", condition), ("mask", mask)):
        if tensor.shape[0] not in (1, len(layouts)):
            raise ValueError(
                f"There are {tensor.shape[0]} {name}s for {len(layouts)} layouts; give one for all or one each."
            )


def check_size(condition: Tensor, image_size: tuple[int, int]) -> None:
    """ValueError unless the picture, (H, W) in pixels, is of the condition's size."""
    if tuple(condition.shape[-2:]) != image_size:
        raise ValueError(
            f"The condition is {condition.shape[-1]}x{condition.shape[-2]} pixels but the image is "
            f"{image_size[1]}x{image_size[0]}; resize the condition or set height and width."
        )


def rows_of(tensor: Tensor, drawn: Sequence[int]) -> Tensor:
    """The rows of the drawn layouts; a single row stands for every layout."""
    return tensor.expand(len(drawn), -1, -1, -1) if tensor.shape[0] == 1 else tensor[list(drawn)]
