"""Between the canvas and layouts: a checked scene to a layout, a layout to a scene, and the marks on phrases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from localctl.layout import Layout, Region
from localctl.masks import mask_to_pil
from localctl.phrases import find_phrase
from localctl.studio.canvas import data_url
from localctl.studio.canvas import scene as canvas_value
from localctl.studio.limits import MAX_REGIONS, Scene, SceneRegion
from localctl.studio.theme import color_of, text_on

Span = tuple[int, int]
_TEXTS = ("phrase", "prompt", "negative_prompt")
_NUMBERS = ("occurrence", "strength", "outside_strength", "start", "end")


def prompt_of(scene: Scene, prompt: str) -> str:
    """Return the prompt, or without one the phrases joined by commas, as DenseDiffusion's page builds the full text."""
    return prompt.strip() or ", ".join(region.phrase for region in scene.regions if region.phrase)


def layout_of(scene: Scene, prompt: str, overlap: str = "share") -> Layout:
    """Return the layout of a scene. ValueError without a prompt and phrases, for a region without a place, and for
    anything that :class:`Layout` refuses."""
    for index, region in enumerate(scene.regions, start=1):
        if not region.is_placed:
            raise ValueError(f"Region {index} has no place yet; drag a box, paint a mask, or delete it.")
    regions = [_region(region) for region in scene.regions]
    if not prompt.strip() and not any(region.phrase for region in scene.regions):
        raise ValueError("There is no prompt; type one, or give a region a phrase.")
    return Layout.from_segments(regions, prompt.strip() or None, scene.height, scene.width, overlap)


def _region(region: SceneRegion) -> Region:
    place: dict[str, Any] = {"box": region.box}
    if region.mask is not None:
        place = {"mask": torch.from_numpy(region.mask)[None]}
    texts: dict[str, Any] = {name: getattr(region, name) or None for name in _TEXTS}
    return Region(**texts, **{name: getattr(region, name) for name in _NUMBERS}, **place)


def scene_of(layout: Layout, size: tuple[int, int]) -> dict[str, Any]:
    """Return what the canvas shows of a layout; ``size``: (height, width) where it has none.

    A region of several boxes becomes a mask. ValueError for more regions than the canvas takes.
    """
    if len(layout.regions) > MAX_REGIONS:
        raise ValueError(f"The layout has {len(layout.regions)} regions; the canvas takes {MAX_REGIONS}.")
    height, width = layout.size or size
    regions = []
    for region in layout.regions:
        item: dict[str, Any] = {name: getattr(region, name) or "" for name in _TEXTS}
        item |= {name: getattr(region, name) for name in _NUMBERS}
        if region.mask is None and len(region.boxes) == 1:
            item["box"] = list(region.boxes[0])
        else:
            mask = region.coverage((height, width))[None] if region.mask is None else region.mask
            item["mask"] = data_url(mask_to_pil(mask), longest=512)
        regions.append(item)
    return canvas_value((height, width), regions)


@dataclass(frozen=True)
class Mark:
    """What is written below a region. spans: the characters of the prompt that are highlighted for it."""

    kind: str
    text: str
    spans: tuple[Span, ...] = ()


def marks_of(scene: Scene, prompt: str, tokens: Sequence[Span]) -> dict[str, Mark]:
    """Return a mark per region: where its phrase is, or why it is nowhere. ``tokens``: their characters."""
    text = prompt_of(scene, prompt)
    shown = " | ".join(text[first:last] for first, last in tokens) or "none"
    marks: dict[str, Mark] = {}
    for region, place in zip(scene.regions, _places(scene, prompt), strict=True):
        own = " ".join(text[first:last] for first, last in _within(tokens, place)) if place else ""
        if not region.phrase:
            marks[region.id] = Mark("ok", "Without words; it takes part in self-attention only.")
        elif place is None:
            found = len(find_phrase(text, region.phrase))
            why = f"occurs {found} times" if found else "is not in the prompt"
            marks[region.id] = Mark("bad", f"“{region.phrase}” {why}. Tokens of the prompt: {shown}")
        elif other := _sharing(region, place, scene, prompt):
            text_of = f"“{region.phrase}” overlaps “{other}” in the prompt. Tokens: {own}"
            marks[region.id] = Mark("bad", text_of, (place,))
        elif not region.is_placed:
            marks[region.id] = Mark("bad", "It has no place yet; drag a box or paint a mask.", (place,))
        else:
            marks[region.id] = Mark("ok", "", (place,))
    return marks


def _places(scene: Scene, prompt: str) -> list[Span | None]:
    """Return the characters of each region's phrase in the prompt, or None."""
    if prompt.strip():
        every = [find_phrase(prompt.strip(), region.phrase) if region.phrase else [] for region in scene.regions]
        wanted = [region.occurrence for region in scene.regions]
        return [found[n] if n < len(found) else None for found, n in zip(every, wanted, strict=True)]
    places: list[Span | None] = []
    first = 0
    for region in scene.regions:
        places.append((first, first + len(region.phrase)) if region.phrase else None)
        first += len(region.phrase) + 2 if region.phrase else 0
    return places


def _sharing(region: SceneRegion, place: Span, scene: Scene, prompt: str) -> str | None:
    """Return the phrase of another region that shares characters with this one's."""
    for other, taken in zip(scene.regions, _places(scene, prompt), strict=True):
        if other.id != region.id and taken is not None and place[0] < taken[1] and taken[0] < place[1]:
            return other.phrase
    return None


def _within(tokens: Sequence[Span], place: Span) -> list[Span]:
    return [(first, last) for first, last in tokens if first < place[1] and place[0] < last]


def highlighted(scene: Scene, prompt: str, marks: Mapping[str, Mark], tokens: Sequence[Span], limit: int) -> str:
    """Return the prompt as HTML, escaped, with the tokens of each phrase in its region's colour.

    limit: how many tokens the text encoder reads; the others are struck through.
    """
    text = prompt_of(scene, prompt)
    if not text:
        return '<div class="prompt-view prompt-empty">The phrases of the regions are marked here.</div>'
    owners = [(span, region) for region in scene.regions for span in marks[region.id].spans]
    parts, at = [], 0
    shown: list[tuple[SceneRegion | None, list[tuple[int, Span]]]] = []  # tokens of one region in a row
    for index, token in enumerate(tokens):
        owner = next((region for span, region in owners if token[0] < span[1] and span[0] < token[1]), None)
        if owner is None or not shown or shown[-1][0] is not owner:
            shown.append((owner, []))
        shown[-1][1].append((index, token))
    for owner, row in shown:
        parts.append(escape(text[at : row[0][1][0]]))
        parts.append(_phrase(text, owner, row, limit, owner is not None and marks[owner.id].kind == "bad"))
        at = row[-1][1][1]
    parts.append(escape(text[at:]))
    count = f"{len(tokens)} of {limit} tokens"
    view = f'<span class="prompt-text">{"".join(parts)}</span><span class="prompt-count">{count}</span>'
    return f'<div class="prompt-view">{view}</div>'


def _phrase(text: str, owner: SceneRegion | None, row: Sequence[tuple[int, Span]], limit: int, is_bad: bool) -> str:
    """Return tokens of one region, or one of none, as HTML. row: number and characters of each."""
    parts, at = [], row[0][1][0]
    for index, (first, last) in row:
        beyond = " token-beyond" if index >= limit else ""
        parts.append(f'{escape(text[at:first])}<span class="token{beyond}">{escape(text[first:last])}</span>')
        at = last
    if owner is None:
        return "".join(parts)
    color = color_of(owner.color)
    bad = " phrase-bad" if is_bad else ""
    return f'<mark class="phrase{bad}" style="background:{color};color:{text_on(color)}">{"".join(parts)}</mark>'
