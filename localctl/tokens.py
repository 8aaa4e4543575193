"""The positions of a layout's phrases among the tokens of its prompt, found by character offsets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from localctl.layout import Layout


def token_positions(
    tokenizer: Any, layout: Layout, convert: Callable[[str], str] | None = None
) -> list[tuple[int, ...]]:
    """Return for each region the positions of its phrase in the text encoder's output; () for one without words.

    Args:
        tokenizer: a fast tokenizer (one with character offsets); its ``model_max_length`` is the limit.
        layout: its prompt is tokenised as a whole, with the start token at position 0.
        convert: the pipeline's conversion of a prompt before it is tokenised, if any.

    Raises:
        ValueError: more regions than tokens; a phrase beyond the limit, which the text encoder does not read; two
            phrases that share a token; a phrase that cannot be followed through ``convert``; a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; load the fast tokenizer of the base.")
    spans = [layout.characters(region) for region in layout.regions]
    prompt = layout.prompt
    if convert is not None:
        prompt, spans = _converted(layout, spans, convert)
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    tokenised = " | ".join(prompt[first:last] for first, last in offsets if last > first)
    count = sum(last > first for first, last in offsets)
    with_phrase = [region for region in layout.regions if region.phrase]
    if len(with_phrase) > count:
        raise ValueError(
            f"There are {len(with_phrase)} regions with phrases for {count} tokens ({tokenised}); give fewer regions."
        )
    limit = tokenizer.model_max_length - 1  # the end token takes the last position
    positions: list[tuple[int, ...]] = []
    owner: dict[int, str] = {}
    for region, span in zip(layout.regions, spans, strict=True):
        own = () if span is None else tuple(_within(offsets, span))
        if any(position >= limit for position in own):
            raise ValueError(
                f"The phrase {region.phrase!r} comes after the first {limit + 1} tokens, and this base reads no more "
                f"of the prompt's {len(offsets)} ({tokenised}); shorten the prompt or move the phrase forward."
            )
        for position in own:
            if position in owner:
                raise ValueError(
                    f"The phrases {owner[position]!r} and {region.phrase!r} share a token of the prompt ({tokenised}); "
                    "put a space between them."
                )
            owner[position] = region.phrase or ""
        positions.append(own)
    return positions


def positions_of(pipe: Any, layout: Layout) -> list[tuple[int, ...]]:
    """Return the :func:`token_positions` of a pipeline.

    With two tokenizers the positions of both are merged: their embeddings are concatenated along channels.
    """
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    # Textual-inversion words of several vectors are expanded, as the pipeline does it for each of its tokenizers.
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
    """Return the converted prompt, and ``spans`` mapped to it by converting the prompt part by part."""
    prompt, whole = layout.prompt, convert(layout.prompt)
    if whole == prompt:
        return prompt, spans
    edges = sorted({0, len(prompt), *(edge for span in spans if span is not None for edge in span)})
    parts = [convert(prompt[first:last]) for first, last in pairwise(edges)]
    if "".join(parts) != whole:
        phrases = ", ".join(repr(region.phrase) for region in layout.regions if region.phrase)
        raise ValueError(
            f"The pipeline converts the prompt to {whole!r}, in which the phrases {phrases} cannot be found; give "
            "phrases that do not split its learned words."
        )
    places = {0: 0}
    for edge, part, before in zip(edges[1:], parts, edges, strict=False):
        places[edge] = places[before] + len(part)
    return whole, [None if span is None else (places[span[0]], places[span[1]]) for span in spans]


def _within(offsets: list[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Return the positions of the tokens that hold a character of ``span``; special tokens hold none."""
    return [
        position
        for position, (first, last) in enumerate(offsets)
        if first < last and first < span[1] and span[0] < last
    ]
