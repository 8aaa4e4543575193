"""Bounds of a layout, and checks of its boxes, masks, texts and numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from localctl.sizes import shown

if TYPE_CHECKING:  # not at runtime: programs that must start fast check texts with this module
    from torch import Tensor

# A layout may come from an untrusted file. Text encoders read 77 tokens, and each phrase takes at least one.
MAX_REGIONS, MAX_BOXES, MAX_STRENGTH = 256, 1024, 1000.0

Box = tuple[float, float, float, float]


def check_count(regions: int, what: str) -> None:
    """Raise a ValueError for more regions than a layout may have. ``what``: the subject of the sentence."""
    if regions > MAX_REGIONS:
        raise ValueError(f"{what} has {regions} regions, more than {MAX_REGIONS}; leave small ones out.")


def check_text(what: str, text: str) -> None:
    """Raise a ValueError for a text with a lone surrogate, which neither tokenizers nor files accept.

    ``what``: the subject of the sentence.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a letter (a lone surrogate at {error.start}), as if the text had been cut or read in "
            "another encoding; write it as UTF-8."
        ) from None


def checked_boxes(name: str, box: Any) -> tuple[Box, ...]:
    """Convert one box or several to a tuple of boxes. ValueError unless they are xyxy in [0, 1].

    ``name``: of the region, for messages.
    """
    try:
        several = list(box)
        several = [several] if several and not isinstance(several[0], (list, tuple)) else several
        if len(several) <= MAX_BOXES:
            boxes = tuple(tuple(float(value) for value in one) for one in several)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"The box of the region {name} must be four numbers (x0, y0, x1, y1), not {shown(box)}."
        ) from error
    if len(several) > MAX_BOXES:
        raise ValueError(f"The region {name} has {len(several)} boxes, more than {MAX_BOXES}; give it a mask.")
    for one in boxes or ((),):
        if len(one) != 4:
            raise ValueError(f"The box of the region {name} must be four numbers (x0, y0, x1, y1), not {shown(one)}.")
        if not all(0 <= value <= 1 for value in one):  # NaN fails, too
            raise ValueError(
                f"The box {one} of the region {name} is not within [0, 1]; divide pixels by width and height."
            )
        if not (one[0] < one[2] and one[1] < one[3]):
            raise ValueError(f"The box {one} of the region {name} is reversed or empty; it needs x0 < x1 and y0 < y1.")
    return boxes  # type: ignore[return-value]


def checked_mask(name: str, mask: Any) -> Tensor:
    """Convert a mask, as :func:`localctl.inputs.as_mask` takes it, to float32 (1,H,W) on the CPU.

    ``name``: of the region, for messages. ValueError for another shape, values outside [0, 1] or an empty mask.
    """
    from localctl.inputs import as_mask

    shape = tuple(getattr(mask, "shape", ()))
    if shape and (len(shape) > 3 or (len(shape) == 3 and 1 not in (shape[0], shape[-1]))):
        raise ValueError(f"The mask of the region {name} must have the shape (H, W) or (1, H, W), not {shape}.")
    converted = as_mask(mask, f"mask of the region {name}")[0].cpu()
    if not converted.any():
        raise ValueError(f"The mask of the region {name} is empty; paint the region white or leave it out.")
    return converted


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number that a float can hold; a bool is not a number here."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
