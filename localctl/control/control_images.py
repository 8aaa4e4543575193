"""Conditions and masks as controls are given them: one for all layouts, or one each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from localctl.layout import Layout


def check_mask(mask: Tensor, condition: Tensor) -> None:
    """ValueError unless ``mask`` (n,1,H,W) is of the size of ``condition`` (n,C,H,W)."""
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
    """ValueError unless the image, (H, W) in pixels, is of the condition's size."""
    if tuple(condition.shape[-2:]) != image_size:
        raise ValueError(
            f"The condition is {condition.shape[-1]}x{condition.shape[-2]} pixels but the image is "
            f"{image_size[1]}x{image_size[0]}; resize the condition or set height and width."
        )


def rows_of(tensor: Tensor, layouts: Sequence[int]) -> Tensor:
    """The rows of these layouts; a single row stands for every layout."""
    return tensor.expand(len(layouts), -1, -1, -1) if tensor.shape[0] == 1 else tensor[list(layouts)]
