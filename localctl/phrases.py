"""From the words of a layout to the tokens that a text encoder sees, by character offsets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localctl.layout import Layout


def find_phrase(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """[first, last) characters of every appearance of ``phrase`` as whole words, in any case and spacing."""
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    return [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE)]


def token_positions(tokenizer: Any, layout: Layout) -> list[tuple[int, ...]]:
    """For each region, which positions of the text encoder's output are its phrase's; () for one without words.

    Args:
        tokenizer: a fast tokenizer (one that knows character offsets); its ``model_max_length`` is the limit.
        layout: its prompt is tokenised as a whole, with the start token at position 0.

    Raises:
        ValueError: more regions than tokens; a phrase behind the limit, where the text encoder does not see it; two
            phrases that share a token; a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; load the fast tokenizer of the base.")
    coded = tokenizer(layout.prompt, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets: list[tuple[int, int]] = coded["offset_mapping"]
    shown = " | ".join(layout.prompt[first:last] for first, last in offsets if last > first)
    count = sum(last > first for first, last in offsets)
    worded = [region for region in layout.regions if region.phrase]
    if len(worded) > count:
        raise ValueError(f"There are {len(worded)} regions for {count} tokens ({shown}); give fewer regions.")
    limit = tokenizer.model_max_length - 1  # the end token needs the last place
    positions: list[tuple[int, ...]] = []
    owner: dict[int, str] = {}
    for region in layout.regions:
        span = layout.characters(region)
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
    found = [token_positions(tokenizer, layout) for tokenizer in tokenizers if tokenizer is not None]
    return [tuple(sorted(set().union(*several))) for several in zip(*found, strict=True)]


def _within(offsets: list[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """The tokens that hold at least one character of ``span``; special tokens hold none."""
    return [
        position
        for position, (first, last) in enumerate(offsets)
        if first < last and first < span[1] and span[0] < last
    ]
