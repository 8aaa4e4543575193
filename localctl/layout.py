"""What to draw: one prompt and a size. Several prompts are a list of layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SIZE_MULTIPLE = 8  # the autoencoders of all supported bases shrink by 8


@dataclass(frozen=True)
class Layout:
    """One prompt and, if it matters, the picture's size in pixels (None = the base's own size).

    ValueError when only one of height and width is given, or a size is no positive multiple of 8.
    """

    prompt: str
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"A layout has one prompt (a str), not {self.prompt!r}; make one layout per prompt.")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"Give a layout both height and width or neither, not {self.height} and {self.width}.")
        for name in ("height", "width"):
            check_side(name, getattr(self, name))

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None for the base's own size."""
        return None if self.height is None or self.width is None else (self.height, self.width)


def check_side(name: str, value: int | None) -> None:
    """ValueError unless ``value`` is None or a positive multiple of 8."""
    if value is None or (value > 0 and value % SIZE_MULTIPLE == 0):
        return
    near = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
    raise ValueError(f"The {name} {value} is not a positive multiple of {SIZE_MULTIPLE}; use {near}, for example.")


def as_layouts(layout: Layout | str | Sequence[Layout | str]) -> tuple[Layout, ...]:
    """A layout, a prompt or a list of either as a tuple of layouts; ValueError for an empty list."""
    several = [layout] if isinstance(layout, (Layout, str)) else list(layout)
    if not several:
        raise ValueError("There is no layout to draw; give at least one prompt.")
    return tuple(item if isinstance(item, Layout) else Layout(item) for item in several)
