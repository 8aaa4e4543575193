"""Layouts: what to generate and where, as one prompt, a size and regions. Several prompts are a list of layouts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from localctl.cells import CELL_MODES, OVERLAPS, resolve_overlap, side_coverage
from localctl.inputs import OptionalImageField
from localctl.layout_checks import MAX_STRENGTH, Box, check_count, check_text, checked_boxes, checked_mask, is_number
from localctl.masks import disc_mask, resize_mask
from localctl.phrases import find_phrase
from localctl.prompt_syntax import read_weights
from localctl.sizes import check_side, shown

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Region:
    """A phrase of the prompt and the place it belongs to.

    Args:
        phrase: words of the prompt, found as whole words in any case. None or "" for a part of the image without words,
            which takes part in self-attention only.
        box: xyxy in [0, 1], or several such boxes for one phrase.
        mask: in place of a box: a PIL image, white = inside, or an array (H, W) or tensor (H, W) or (1, H, W) in
            [0, 1], 1 = inside. A mask of any size is stretched over the image. Stored as float32 (1, H, W).
        occurrence: which of the phrase's occurrences in the prompt is meant, from 0.
        strength, outside_strength: factors of the control's own strengths, inside and outside the region; 0 = no
            effect.
        start, end: steered in the outer steps from start up to, not including, end (fractions of the steps of a call).
        prompt: a local prompt for the region, for controls that use one. negative_prompt: what to avoid in the region.

    Raises:
        ValueError: neither or both of box and mask; a box that is reversed, empty or out of range; an empty mask; a
            number out of range.
    """

    phrase: str | None = None
    box: Box | Sequence[Box] | None = None
    mask: OptionalImageField = OptionalImageField()
    occurrence: int = 0
    strength: float = 1.0
    outside_strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    prompt: str | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("phrase", "prompt", "negative_prompt"):
            text = getattr(self, name)
            if not (text is None or isinstance(text, str)):
                raise ValueError(f"The {name} of a region must be a text, not {shown(text)}.")
            check_text(f"The {name} of a region", text or "")
            object.__setattr__(self, name, (text or "").strip() or None)
        if (self.box is None) == (self.mask is None):
            raise ValueError(f"The region {self.name} needs either a box or a mask; give exactly one of them.")
        if self.box is not None:
            object.__setattr__(self, "box", checked_boxes(self.name, self.box))
        else:
            object.__setattr__(self, "mask", checked_mask(self.name, self.mask))
        if not isinstance(self.occurrence, int) or isinstance(self.occurrence, bool) or self.occurrence < 0:
            raise ValueError(
                f"The occurrence of the region {self.name} must be a whole number from 0, not {shown(self.occurrence)}."
            )
        for name in ("strength", "outside_strength"):
            value = getattr(self, name)
            if not is_number(value):
                raise ValueError(f"The {name} of the region {self.name} must be a finite number, not {shown(value)}.")
            if abs(value) > MAX_STRENGTH:
                raise ValueError(
                    f"The {name} of the region {self.name} must be at most {MAX_STRENGTH:g}, beyond which numbers "
                    f"overflow, not {shown(value)}."
                )
        if not (is_number(self.start) and is_number(self.end) and 0 <= self.start < self.end <= 1):
            raise ValueError(
                f"The region {self.name} needs 0 <= start < end <= 1 (fractions of the steps), "
                f"not {shown(self.start)} and {shown(self.end)}."
            )

    @classmethod
    def disc(cls, phrase: str | None, centre: tuple[float, float], radius: float = 0.2, **options: Any) -> Region:
        """Return a region with a disc around ``centre`` (x, y) as mask, see :func:`localctl.masks.disc_mask`.

        The default radius is the published one of space-time attention. ``options``: the other arguments of a region.
        """
        return cls(phrase, mask=disc_mask(centre, radius), **options)

    @property
    def name(self) -> str:
        """The name of the region in messages and images."""
        return repr(self.phrase) if self.phrase else "without words"

    @property
    def boxes(self) -> tuple[Box, ...]:
        """All boxes, xyxy in [0, 1]; empty for a region with a mask."""
        return () if self.box is None else self.box  # type: ignore[return-value]  # normalised on entry

    def within(self, step: int, num_steps: int) -> bool:
        """Return whether the region is steered in this outer step."""
        return self.start <= step / num_steps < self.end

    def coverage(self, size: tuple[int, int], mode: str = "area") -> Tensor:
        """Return how far each cell of a grid of ``size`` = (h, w) belongs to the region: (h, w) in [0, 1].

        ``mode``: as for :func:`localctl.masks.resize_mask`; or ``centre``: 1 if the cell's centre is inside, else 0; or
        ``floor``: boxes with all edges rounded down to whole cells, masks as for ``nearest``.
        """
        if mode not in CELL_MODES:
            raise ValueError(f"Unknown mask resize {mode!r}; choose one of {', '.join(CELL_MODES)}.")
        if self.mask is None:
            rows = [side_coverage(top, bottom, size[0], mode) for _, top, _, bottom in self.boxes]
            columns = [side_coverage(left, right, size[1], mode) for left, _, right, _ in self.boxes]
            return (torch.stack(rows)[:, :, None] * torch.stack(columns)[:, None]).amax(dim=0)
        if mode == "centre":
            # Bilinear between the four pixels around the centre: inside only if all four are.
            mask = torch.nn.functional.interpolate(self.mask[None], size=size, mode="bilinear")[0, 0]
            return (mask >= self.mask.max() * (1 - 1e-6)).float()
        return resize_mask(self.mask[None], size, "nearest" if mode == "floor" else mode)[0, 0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        if (self.mask is None) != (other.mask is None):
            return False
        same = self.mask is None or torch.equal(self.mask, other.mask)
        names = [field.name for field in fields(self) if field.name != "mask"]
        return same and all(getattr(self, name) == getattr(other, name) for name in names)

    def __hash__(self) -> int:
        return hash((self.phrase, self.box, self.occurrence, self.prompt))


@dataclass(frozen=True)
class Layout:
    """One prompt with an optional size and regions.

    Args:
        prompt: one text.
        height, width: of the image in pixels, positive multiples of 8; None for both: the base's default size.
        regions: at most one per word of the prompt; their phrases may not overlap.
        overlap: the policy where regions cover the same place. ``share``: all of them apply; ``first``, ``last`` or
            ``smallest``: the first or last in the list, or the smallest, hides the others; ``error``: refused.

    Raises:
        ValueError: an invalid size; a phrase that is not in the prompt or overlaps another; a region that is completely
            hidden by others; an unknown overlap policy.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    regions: tuple[Region, ...] = ()
    overlap: str = "share"

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(
                f"The prompt of a layout must be one text, not {shown(self.prompt)}; make one layout per prompt."
            )
        check_text("The prompt of a layout", self.prompt)
        if (self.height is None) != (self.width is None):
            raise ValueError(
                f"A layout needs both height and width or neither, not {self.height} and {self.width}; give both."
            )
        for name in ("height", "width"):
            check_side(name, getattr(self, name))
        object.__setattr__(self, "regions", tuple(self.regions))
        check_count(len(self.regions), "The layout")
        for region in self.regions:
            if not isinstance(region, Region):
                raise ValueError(f"The regions of a layout must be Region objects, not {type(region).__name__}.")
        if self.overlap not in OVERLAPS:
            raise ValueError(f"Unknown overlap policy {self.overlap!r}; choose one of {', '.join(OVERLAPS)}.")
        _check_phrases(self)
        _check_overlap(self)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None for the base's default size."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    def characters(self, region: Region) -> tuple[int, int] | None:
        """Return the [first, last) characters of the region's phrase in the prompt; None for a region without words.

        Marks of weights within or around its words do not matter (:func:`localctl.prompt_syntax.read_weights`).
        ValueError if the prompt does not have this occurrence of the phrase.
        """
        if region.phrase is None:
            return None
        found = find_words(self.prompt, region.phrase)
        if region.occurrence < len(found):
            return found[region.occurrence]
        words = " | ".join(self.prompt.split())
        if found:
            raise ValueError(
                f"The phrase {region.phrase!r} occurs {len(found)} times in the prompt ({words}), so there is no "
                f"occurrence {region.occurrence}; occurrences count from 0."
            )
        raise ValueError(f"The phrase {region.phrase!r} is not in the prompt ({words}); use words of the prompt.")

    def masks(self, size: tuple[int, int], mode: str = "area") -> Tensor:
        """Return each region on a grid of ``size`` = (h, w), overlaps resolved: (n, 1, h, w) float32 in [0, 1].

        However coarse the grid, every region has at least one cell with the value of the region's largest pixel.
        """
        if not self.regions:
            return torch.zeros(0, 1, *size)
        coverages = torch.stack([region.coverage(size, mode) for region in self.regions])  # (n,h,w)
        masks = []
        for region, whole, part in zip(self.regions, coverages, resolve_overlap(coverages, self.overlap), strict=True):
            peak = 1.0 if region.mask is None else float(region.mask.max())
            if not part.any():  # too small for this grid, or hidden on it: take the cells that it covers most
                part = whole if whole.any() else region.coverage(size)
                part = (part >= part.max() * (1 - 1e-6)).float()
            masks.append(part / part.max() * peak if part.max() < peak else part)
        return torch.stack(masks)[:, None]

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[Region],
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        overlap: str = "share",
    ) -> Layout:
        """Return a layout of segments; without a ``prompt``, their phrases joined by commas become the prompt.

        Each segment then refers to its own part of the prompt, and its ``occurrence`` is ignored. ValueError as for the
        layout itself, or when there is neither a prompt nor a phrase.
        """
        if prompt is not None:
            return cls(prompt, height, width, tuple(segments), overlap)
        check_count(len(segments), "The layout")
        phrases = [" ".join(segment.phrase.split()) for segment in segments if segment.phrase]
        if not phrases:
            raise ValueError("There is neither a prompt nor a segment with a phrase to build one from; give a prompt.")
        prompt = ", ".join(phrases)
        regions, first = [], 0
        for segment in segments:
            if segment.phrase:
                phrase = " ".join(segment.phrase.split())
                before = sum(start < first for start, _ in find_words(prompt, phrase))
                segment = replace(segment, phrase=phrase, occurrence=before)
                first += len(phrase) + len(", ")
            regions.append(segment)
        return cls(prompt, height, width, tuple(regions), overlap)

    def draw(self, picture: Image.Image | None = None) -> Image.Image:
        """Render the regions. Deprecated; use :func:`localctl.drawing.render_layout`."""
        warnings.warn("Layout.draw is now localctl.drawing.render_layout.", DeprecationWarning, stacklevel=2)
        from localctl.drawing import render_layout

        return render_layout(self, picture)


def as_layouts(layout: Layout | str | Sequence[Layout | str]) -> tuple[Layout, ...]:
    """Convert a layout, a prompt or a list of either to a tuple of layouts; ValueError for an empty list."""
    several = [layout] if isinstance(layout, (Layout, str)) else list(layout)
    if not several:
        raise ValueError("There is no layout to generate an image from; give at least one prompt.")
    return tuple(item if isinstance(item, Layout) else Layout(item) for item in several)


def texts_of(layouts: Iterable[Layout]) -> list[str]:
    """Return all texts of layouts: their prompts, and those of their regions."""
    several = [
        (layout.prompt, *(text for region in layout.regions for text in (region.prompt, region.negative_prompt)))
        for layout in layouts
    ]
    return [text for texts in several for text in texts if text]


def find_words(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Return what :func:`find_phrase` does for both texts without marks of weights, as characters of ``prompt``; if
    that is nothing, for both with their marks."""
    read = read_weights(prompt)
    found = find_phrase(read.text, read_weights(phrase).text)
    return [(read.places[first], read.places[last - 1] + 1) for first, last in found] or find_phrase(prompt, phrase)


def _check_phrases(layout: Layout) -> None:
    spans = [(layout.characters(region), region) for region in layout.regions if region.phrase]
    for index, (span, region) in enumerate(spans):
        assert span is not None
        for other, earlier in spans[:index]:
            assert other is not None
            if span[0] < other[1] and other[0] < span[1]:
                raise ValueError(
                    f"The phrases {earlier.phrase!r} and {region.phrase!r} overlap in the prompt {layout.prompt!r}; "
                    "give each region words of its own (occurrence= chooses a later occurrence)."
                )


def _check_overlap(layout: Layout) -> None:
    if layout.overlap == "share" or len(layout.regions) < 2:
        return
    height, width = layout.size or (512, 512)
    coverage = torch.stack([region.coverage((height // 8, width // 8)) for region in layout.regions])
    if layout.overlap == "error" and float(coverage.sum(dim=0).max()) > 1 + 1e-4:
        place = (coverage.sum(dim=0) > 1 + 1e-4).nonzero()[0]
        names = [region.name for region, cover in zip(layout.regions, coverage, strict=True) if cover[tuple(place)] > 0]
        raise ValueError(f"The regions {' and '.join(names)} overlap; choose another overlap policy to allow it.")
    for region, part in zip(layout.regions, resolve_overlap(coverage, layout.overlap), strict=True):
        if float(part.max()) < 1e-4:
            raise ValueError(
                f"The region {region.name} is completely hidden by others under the overlap policy {layout.overlap!r}; "
                "move it or choose another policy."
            )
