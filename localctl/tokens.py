"""The positions of a layout's phrases among the tokens of its prompt, found by character offsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from localctl.compel_texts import has_compel, token_places
from localctl.layout import Layout
from localctl.prompt_syntax import WeightedText, read_weights
from localctl.prompt_weights import reads_weights

Span = tuple[int, int]  # [first, last) characters


def token_positions(
    tokenizer: Any,
    layout: Layout,
    convert: Callable[[str], str] | None = None,
    weighted: bool = False,
    *,
    stripped: bool = False,
    limit: int | None = None,
    around: tuple[str, str] = ("", ""),
    dropped: int = 0,
) -> list[tuple[int, ...]]:
    """Return for each region the positions of its phrase in the text encoder's output; () for one without words.

    Args:
        tokenizer: a fast tokenizer (one with character offsets).
        layout: its prompt is tokenised as a whole, with the tokenizer's start token, if any, at position 0.
        convert: the pipeline's conversion of a prompt before it is tokenised, if any.
        weighted: the pipeline reads weights and prompts of any length.
        stripped: the pipeline removes blanks around the prompt.
        limit: how many tokens are read, with the end token; None: the tokenizer's ``model_max_length``.
        around: what the pipeline's template puts before and after the prompt.
        dropped: how many of the first tokens are left out of the text encoder's output.

    Raises:
        ValueError: more regions than tokens; a phrase beyond the limit, which the text encoder does not read; two
            phrases that share a token; a phrase that cannot be followed through ``convert``; a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; load the fast tokenizer of the base.")
    read = read_weights(layout.prompt) if weighted else WeightedText.plain(layout.prompt)
    spans = [span and read.span(span) for span in map(layout.characters, layout.regions)]
    prompt, parts = read.text, read.spans
    if convert is not None:
        prompt, spans, parts = _converted(layout, read, spans, convert)
    if stripped:
        prompt, spans, parts = _stripped(prompt, spans)
    if any(around):
        offsets = _within_template(tokenizer, prompt, around)[dropped:]
    else:
        offsets = _offsets(tokenizer, prompt, parts)
    tokenised = " | ".join(prompt[first:last] for first, last in offsets if last > first)
    _check_count(layout, sum(last > first for first, last in offsets), tokenised)
    limit = (limit or tokenizer.model_max_length) - 1  # the end token takes the last position
    places: Sequence[int] = range(len(offsets))
    if weighted and len(offsets) > limit + 1 and has_compel():
        places, limit = [0, *token_places(tokenizer, [prompt[first:last] for first, last in parts])], len(offsets)
    positions: list[tuple[int, ...]] = []
    owner: dict[int, str] = {}
    for region, span in zip(layout.regions, spans, strict=True):
        own = () if span is None else tuple(_within(offsets, span))
        if any(position >= limit for position in own):
            raise ValueError(
                f"The phrase {region.phrase!r} comes after the first {limit + 1} tokens, and this base reads no more "
                f"of the prompt's {len(offsets)} ({tokenised}); shorten the prompt or move the phrase forward."
            )
        _claim(own, region.phrase or "", owner, tokenised)
        positions.append(tuple(places[position] for position in own))
    return positions


def _claim(own: Sequence[int], phrase: str, owner: dict[int, str], tokenised: str) -> None:
    """Note that the tokens at ``own`` are the phrase's. ValueError if another has one of them already."""
    for position in own:
        if position in owner:
            raise ValueError(
                f"The phrases {owner[position]!r} and {phrase!r} share a token of the prompt ({tokenised}); "
                "put a space between them."
            )
        owner[position] = phrase


def _check_count(layout: Layout, count: int, tokenised: str) -> None:
    with_phrase = [region for region in layout.regions if region.phrase]
    if len(with_phrase) > count:
        raise ValueError(
            f"There are {len(with_phrase)} regions with phrases for {count} tokens ({tokenised}); give fewer regions."
        )


def positions_of(pipe: Any, layout: Layout) -> list[tuple[int, ...]]:
    """Return the :func:`token_positions` of a pipeline, for prompts as it reads them at the moment.

    With two tokenizers the positions of both are merged: their embeddings are concatenated along channels.
    """
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    # Textual-inversion words of several vectors are expanded, as the pipeline does it for each of its tokenizers.
    convert = getattr(pipe, "maybe_convert_prompt", None)
    found = [
        token_positions(tokenizer, layout, convert and partial(convert, tokenizer=tokenizer), reads_weights(pipe))
        for tokenizer in tokenizers
        if tokenizer is not None
    ]
    return [tuple(sorted(set().union(*several))) for several in zip(*found, strict=True)]


def _offsets(tokenizer: Any, prompt: str, parts: Sequence[Span]) -> list[Span]:
    """Return the characters of each token, with the start and the end token; each part is tokenised by itself."""
    found: list[Span] = [(0, 0)]
    for start, end in parts:
        encoded = tokenizer(prompt[start:end], return_offsets_mapping=True, truncation=False, verbose=False)
        offsets: list[Span] = encoded["offset_mapping"]
        if len(parts) == 1:
            return offsets
        found += [(start + first, start + last) for first, last in offsets[1:-1]]
    return [*found, (0, 0)]


def _within_template(tokenizer: Any, prompt: str, around: tuple[str, str]) -> list[Span]:
    """Return the characters of the prompt in each token of the prompt within its template; none in the template's."""
    whole, less = prompt.join(around), len(around[0])
    offsets = _offsets(tokenizer, whole, [(0, len(whole))])
    return [tuple(min(max(place - less, 0), len(prompt)) for place in span) for span in offsets]  # type: ignore[misc]


def _converted(
    layout: Layout, read: WeightedText, spans: list[Span | None], convert: Callable[[str], str]
) -> tuple[str, list[Span | None], list[Span]]:
    """Return the converted prompt, and ``spans`` and the parts of equal weight mapped to it by converting the prompt
    part by part."""
    prompt, stretches, whole = read.text, read.spans, convert(read.text)
    if whole == prompt:
        return prompt, spans, stretches
    edges = sorted({0, len(prompt), *(edge for span in [*spans, *stretches] if span is not None for edge in span)})
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
    moved = [None if span is None else (places[span[0]], places[span[1]]) for span in spans]
    return whole, moved, [(places[first], places[last]) for first, last in stretches]


def _stripped(prompt: str, spans: list[Span | None]) -> tuple[str, list[Span | None], list[Span]]:
    """Return a prompt of one part without the blanks around it, and ``spans`` moved alike."""
    less = len(prompt) - len(prompt.lstrip())
    moved = [None if span is None else (max(span[0] - less, 0), span[1] - less) for span in spans]
    return prompt.strip(), moved, [(0, len(prompt.strip()))]


def _within(offsets: list[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Return the positions of the tokens that hold a character of ``span``; special tokens hold none."""
    return [
        position
        for position, (first, last) in enumerate(offsets)
        if first < last and first < span[1] and span[0] < last
    ]
