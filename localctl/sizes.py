"""Sizes of images in pixels: allowed sides, and the format WIDTHxHEIGHT; and values as shown in error sentences."""

from __future__ import annotations

import re
from typing import Any

SIZE_MULTIPLE = 8  # the autoencoders of all supported bases shrink by 8
MAX_SIDE = 8192
PHOTO_PIXELS = 120_000_000  # default limit for photos, which are scaled down; cameras have up to 102 million pixels
_TYPED = re.compile(r"(\d+)\s*[x×*]\s*(\d+)", re.IGNORECASE)


def near_side(side: float, multiple: int = SIZE_MULTIPLE) -> int:
    """Return the positive multiple of ``multiple`` that is nearest to ``side``."""
    return max(multiple, round(side / multiple) * multiple)


def check_side(name: str, value: int | None) -> None:
    """Raise a ValueError unless ``value`` is None or a positive multiple of 8 up to 8192."""
    if value is None or (0 < value <= MAX_SIDE and value % SIZE_MULTIPLE == 0):
        return
    if value > MAX_SIDE:
        raise ValueError(f"The {name} {shown(value)} is over {MAX_SIDE} pixels; generate a smaller image.")
    raise ValueError(
        f"The {name} {value} is not a positive multiple of {SIZE_MULTIPLE}; use {near_side(value)}, for example."
    )


def typed_size(text: str) -> tuple[int, int] | None:
    """Parse a size WIDTHxHEIGHT, such as "512x768", into (height, width); None for any other text."""
    found = _TYPED.fullmatch(text.strip())
    return (int(found[2]), int(found[1])) if found else None


def shown(value: Any) -> str:
    """Return the repr of ``value`` for an error sentence, shortened if it is long or deeply nested."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
