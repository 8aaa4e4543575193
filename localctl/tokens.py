"""The tokens of a layout's phrases, as a text encoder sees them, by character offsets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from localctl.layout import Layout


def token_positions(
    tokenizer: Any, layout: Layout, convert: Callable[[str], str] | None = None
) -> list[tuple[int, ...]]:
    """For each region, which positions of the text encoder's output are its phrase's; () for one without words.

    Args:
        tokenizer: a fast tokenizer (one that knows character offsets); its ``model_max_length`` is the limit.
        layout: its prompt is tokenised as a whole, with the start token at position 0.
        convert: what the pipeline does to a prompt before it tokenises it.

    Raises:
        ValueError: more regions than tokens; a phrase behind the limit, where the text encoder does not see it; two
            phrases that share a token; a phrase of which ``convert`` makes something else; a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; load the fast tokenizer of the base.")
    spans = [layout.characters(region) for region in layout.regions]
    prompt = layout.prompt
    if convert is not None:
        prompt, spans = _converted(layout, spans, convert)
    coded = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets: list[tuple[int, int]] = coded["offset_mapping"]
    shown = " | ".join(prompt[first:last] for first, last in offsets if last > first)
    count = sum(last > first for first, last in offsets)
    worded = [region for region in layout.regions if region.phrase]
    if len(worded) > count:
        raise ValueError(f"There are {len(worded)} regions for {count} tokens ({shown}); give fewer regions.")
    limit = tokenizer.model_max_length - 1  # the end token needs the last place
    positions: list[tuple[int, ...]] = []
    owner: dict[int, str] = {}
    for region, span in zip(layout.regions, spans, strict=True):
        own = () if span is None else tuple(_within(offsets, span))
        if any(position >= limit for position in own):
            raise ValueError(
                f"The phrase {region.phrase!r} stands behind the first {limit + 1} tokens, all that this base reads of "
                f"the {len(offsets)} of the prompt ({shown}); shorten the prompt or move the phrase forward."
            )
        for position in own:
            if position in owner:
                raise ValueError(
                    f"The phrases {owner[position]!r} and {region.phrase!r} share a token of the prompt ({shown}); "
                    "put a space between them."
                )
            owner[position] = region.phrase or ""
        positions.append(own)
    return positions


def positions_of(pipe: Any, layout: Layout) -> list[tuple[int, ...]]:
    """:func:`token_positions` of a pipeline; of both tokenizers where it has two: their outputs stand side by side."""
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    # Learned words of several vectors are written out, as the pipeline does it for each of its tokenizers.
    convert = getattr(pipe, "maybe_convert_prompt", None)
    found = [
        token_positions(tokenizer, layout, convert and partial(convert, tokenizer=tokenizer))
        for tokenizer in tokenizers
        if tokenizer is not None
    ]
    return [tuple(sorted(set().union(*several))) for several in zip(*found, strict=True)]


def _converted(
    layout: Layout, spans: list[tuple[int, int] | None], convert: Callable[[str], str]
) -> tuple[str, list[tuple[int, int] | None]]:
    """Return the prompt as it is tokenised, and where the phrases at ``spans`` are in it: it is converted part by
    part."""
    prompt, whole = layout.prompt, convert(layout.prompt)
    if whole == prompt:
        return prompt, spans
    edges = sorted({0, len(prompt), *(edge for span in spans if span is not None for edge in span)})
    parts = [convert(prompt[first:last]) for first, last in pairwise(edges)]
    if "".join(parts) != whole:
        phrases = ", ".join(repr(region.phrase) for region in layout.regions if region.phrase)
        raise ValueError(
            f"The pipeline reads the prompt as {whole!r}, where the phrases {phrases} can't be followed; give phrases "
            "that hold its learned words as a whole."
        )
    places = {0: 0}
    for edge, part, before in zip(edges[1:], parts, edges, strict=False):
        places[edge] = places[before] + len(part)
    return whole, [None if span is None else (places[span[0]], places[span[1]]) for span in spans]


def _within(offsets: list[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Return the tokens that hold at least one character of ``span``; special tokens hold none."""
    return [
        position
        for position, (first, last) in enumerate(offsets)
        if first < last and first < span[1] and span[0] < last
    ]
