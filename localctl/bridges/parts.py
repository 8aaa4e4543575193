"""What all formats of layouts share: texts with places to a layout, and what a format leaves out of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from localctl.boxes import box_around
from localctl.color_maps import Color
from localctl.images import png_bytes
from localctl.layout import Layout, Region, find_words
from localctl.layout_checks import Box, check_count
from localctl.masks import mask_to_pil
from localctl.prompt_syntax import read_weights
from localctl.sizes import MAX_SIDE, near_side, shown

Size = tuple[int, int]
DEFAULT_SIDE = 512  # pixels, of files that need a size where the layout has none
_PLACES = 6  # decimals of boxes: far below a pixel, and sums of them are exact again


@dataclass(frozen=True)
class Exported:
    """Files of an exported layout, name -> content, the main one first. notes: what the format does not hold, and what
    to do there, one sentence each."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def no_image(name: str) -> Image.Image:
    raise ValueError(f"The layout needs the image {shown(name)}; give it, too.")


@dataclass(frozen=True)
class Inputs:
    """What a format may need beside the content of the file.

    image: opens an image that the file names. prompt: in place of the file's. size: (height, width) in pixels, in place
    of the file's. index: of the scene in a file with several. colors: colour -> phrase, for a colour map.
    """

    image: Callable[[str], Image.Image] = no_image
    prompt: str | None = None
    size: Size | None = None
    index: int | str | None = None
    colors: Mapping[Color | str, str] = field(default_factory=dict)

    def sized(self, height: Any = None, width: Any = None) -> Size | None:
        """Return the size asked for, else the file's, to the nearest multiples of 8; None without either.

        ValueError for sides that are no pixels.
        """
        if self.size is not None:
            return self.size
        if height is None and width is None:
            return None
        for side in (height, width):
            if not isinstance(side, (int, float)) or isinstance(side, bool) or not 0 < side <= MAX_SIDE:
                raise ValueError(f"The file's size is {shown(width)}x{shown(height)}; give --width and --height.")
        return near_side(height), near_side(width)

    def needed_size(self, height: Any = None, width: Any = None) -> Size:
        """Return :meth:`sized`; ValueError if there is no size."""
        size = self.sized(height, width)
        if size is None:
            raise ValueError("The boxes are in pixels and the file has no size; give --width and --height.")
        return size


def layout_of(base: str, regions: Sequence[Region], size: Size | None) -> Layout:
    """Return a layout of regions whose phrases are whole texts.

    If all of them stand in ``base``, each in a place of its own, it is the prompt; the n-th region with the same text
    gets its n-th occurrence. Otherwise the prompt is ``base`` with the texts after it, joined by commas. The prompt
    keeps the marks of weights; phrases are found, and named, without them.
    """
    check_count(len(regions), "The file")
    height, width = size or (None, None)
    base = " ".join(base.split())
    placed: list[Region] = []
    for region in regions:
        phrase = region.phrase or ""
        before = sum(bool(other.phrase) and _same(other.phrase or "", phrase) for other in placed)
        if phrase and not _stands_in(base, phrase, before):
            break
        placed.append(replace(region, occurrence=before))
    else:
        if base and _apart(base, placed):
            return Layout(base, height, width, tuple(map(_unmarked, placed)))
    if not base:
        joined = Layout.from_segments(regions, None, height, width)
        return replace(joined, regions=tuple(map(_unmarked, joined.regions)))
    joined = Layout.from_segments([Region(base, (0, 0, 1, 1)), *regions], None, height, width)
    return replace(joined, regions=tuple(map(_unmarked, joined.regions[1:])))


def text_of(region: Region) -> str:
    """Return the words for a region in a format with a prompt per region: its own prompt, or its phrase."""
    return region.prompt or region.phrase or ""


def worded(layout: Layout) -> list[Region]:
    """Return the regions with words. ValueError if there is none."""
    found = [region for region in layout.regions if text_of(region)]
    if not found:
        raise ValueError("The layout has no region with words, so there is nothing to export; name its regions.")
    return found


def box_of(sides: Sequence[Any], unit: tuple[float, float] = (1, 1)) -> Box:
    """Return xyxy in [0, 1] of ``sides`` = (x, y, width, height) where the image is ``unit`` = (height, width), clipped
    to the image.

    ValueError for anything but numbers, or no area in the image.
    """
    try:
        left, top, wide, high = (float(value) for value in sides)
        corners = (left / unit[1], top / unit[0], (left + wide) / unit[1], (top + high) / unit[0])
        x0, y0, x1, y1 = (round(min(max(value, 0.0), 1.0), _PLACES) for value in corners)
        good = x0 < x1 and y0 < y1
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        good = False
    if not good:
        raise ValueError(f"The box (x, y, width, height) {shown(tuple(sides))} has no area in the image; correct it.")
    return x0, y0, x1, y1


def sides_of(box: Box) -> tuple[float, float, float, float]:
    """Return (x, y, width, height) in [0, 1] of a box."""
    x0, y0, x1, y1 = box
    return round(x0, _PLACES), round(y0, _PLACES), round(x1 - x0, _PLACES), round(y1 - y0, _PLACES)


def boxes_of(region: Region) -> tuple[Box, ...]:
    """Return the boxes of a region; of a mask the box around it."""
    if region.mask is None:
        return region.boxes
    x0, y0, x1, y1 = box_around(region.mask[0].numpy())
    return (box_of((x0, y0, x1 - x0, y1 - y0), (region.mask.shape[-2], region.mask.shape[-1])),)


def left_out(layout: Layout, kept: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence that names the values of the layout's regions which a format does not hold.

    ``kept``: the names that it holds; ``mask`` if masks stay masks.
    """
    names = [item.name for item in fields(Region) if item.name not in ("phrase", "box", "occurrence", "mask", *kept)]
    defaults = {item.name: item.default for item in fields(Region)}
    lost = [name for name in names if any(getattr(region, name) != defaults[name] for region in layout.regions)]
    lost += ["overlap"] if layout.overlap != "share" and "overlap" not in kept else []
    notes = [f"The format has no {', '.join(lost)}: left out."] if lost else []
    if "mask" not in kept and any(region.mask is not None for region in layout.regions):
        notes.append("The format has boxes alone: each mask is written as the box around it.")
    if not all(text_of(region) for region in layout.regions) and "phrase" not in kept:
        notes.append("Regions without words are left out.")
    return tuple(notes)


def painted(layout: Layout, color: Callable[[int], tuple[int, int, int]], ground: tuple[int, int, int]) -> Image.Image:
    """Paint each region with words in its colour on ``ground``, at the layout's size.

    Where regions overlap the smaller one lies on top; with the layout's policy ``first`` or ``last`` that one.
    ValueError for a region that is hidden.
    """
    height, width = layout.size or (DEFAULT_SIDE, DEFAULT_SIDE)
    regions = worded(layout)
    masks = [region.coverage((height, width)).numpy() > 0.5 for region in regions]
    order = list(range(len(regions)))
    if layout.overlap == "first":
        order.reverse()
    elif layout.overlap != "last":
        order.sort(key=lambda index: -int(masks[index].sum()))
    image = np.empty((height, width, 3), np.uint8)
    image[:] = ground
    for index in order:
        image[masks[index]] = color(index)
    for index, region in enumerate(regions):
        if not (image == color(index)).all(axis=-1).any():
            raise ValueError(
                f"The region {region.name} is hidden or smaller than a pixel; a colour map cannot hold it."
            )
    return Image.fromarray(image)


def overlap_note(layout: Layout) -> tuple[str, ...]:
    """Return a sentence if regions overlap, which a map with one colour per pixel cannot hold."""
    regions = worded(layout)
    size = layout.size or (DEFAULT_SIDE, DEFAULT_SIDE)
    covered = sum(region.coverage((size[0] // 8, size[1] // 8)).numpy() > 0.5 for region in regions)
    return ("Regions overlap: each pixel of the map belongs to the one on top.",) if np.max(covered) > 1 else ()


def json_file(name: str, content: Any) -> dict[str, bytes]:
    """Return a file of JSON: its name and content."""
    return {name: (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()}


def mask_file(name: str, region: Region) -> dict[str, bytes]:
    """Return a PNG file of the region's mask, white = inside."""
    assert region.mask is not None
    return {name: png_bytes(mask_to_pil(region.mask))}


def as_text(value: Any, what: str) -> str:
    """Return ``value`` without spaces at its ends. ValueError, which names ``what``, unless it is a text."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a text, not {shown(value)}.")
    return value.strip()


def _same(first: str, second: str) -> bool:
    words = [" ".join(read_weights(text).text.lower().split()) for text in (first, second)]
    return words[0] == words[1]


def _stands_in(base: str, phrase: str, occurrence: int) -> bool:
    """Return whether ``base`` has this occurrence of the phrase, with the phrase's weights if it has any."""
    found, own = find_words(base, phrase), read_weights(phrase)
    if len(found) <= occurrence:
        return False
    prompt = read_weights(base)
    return not own.is_weighted or set(prompt.cut(*prompt.span(found[occurrence])).weights) == set(own.weights)


def _unmarked(region: Region) -> Region:
    """Return the region with its phrase without marks of weights, which stand in the prompt."""
    words = read_weights(region.phrase or "").text.strip()
    return replace(region, phrase=words) if words and read_weights(words).text == words else region


def _apart(prompt: str, regions: Sequence[Region]) -> bool:
    """Return whether no two phrases overlap in the prompt."""
    spans = sorted(find_words(prompt, region.phrase)[region.occurrence] for region in regions if region.phrase)
    return all(first[1] <= second[0] for first, second in pairwise(spans))
