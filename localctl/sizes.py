"""Sizes of images in pixels: which sides are possible, and how a size is typed."""

from __future__ import annotations

import re

SIZE_MULTIPLE = 8  # the autoencoders of all supported bases shrink by 8
PHOTO_PIXELS = 120_000_000  # of a photo that is scaled down anyway; cameras have up to 102 million
_TYPED = re.compile(r"(\d+)\s*[x×*]\s*(\d+)", re.IGNORECASE)


def check_side(name: str, value: int | None) -> None:
    """ValueError unless ``value`` is a positive multiple of 8 or None."""
    if value is None or (value > 0 and value % SIZE_MULTIPLE == 0):
        return
    near = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
    raise ValueError(f"The {name} {value} is not a positive multiple of {SIZE_MULTIPLE}; use {near}, for example.")


def typed_size(text: str) -> tuple[int, int] | None:
    """(height, width) of a size as people type it, WIDTHxHEIGHT like "512x768"; None for any other text."""
    found = _TYPED.fullmatch(text.strip())
    return (int(found[2]), int(found[1])) if found else None
