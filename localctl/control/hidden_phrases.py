"""Prompts without their objects: what the tokens outside the phrases say when the phrases are hidden from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from localctl.control.base import CallContext
from localctl.control.regions import BoundRegions, encode_texts
from localctl.layout import Layout


def without_phrases(layout: Layout) -> str:
    """The prompt with the phrases of all regions left out."""
    spans = sorted(span for region in layout.regions if (span := layout.characters(region)) is not None)
    kept, end = [], 0
    for first, last in spans:
        kept.append(layout.prompt[end:first])
        end = max(end, last)
    return " ".join("".join([*kept, layout.prompt[end:]]).split())


class HiddenPhrases:
    """Keeps the objects out of all tokens but their own.

    In a text encoder, each token knows those before it, and the end and padding know them all: cells that look at no
    phrase still read of every object. Here all tokens but the phrases' are those of the prompt without the phrases;
    with ``keep=False``, all tokens.
    """

    def __init__(self, pipe: Any, regions: BoundRegions, keep: bool = True) -> None:
        self.pipe, self.regions, self.keep = pipe, regions, keep
        self._texts: dict[int, Tensor] = {}  # by layout: (K, C) of its prompt without phrases
        self._last: tuple[Any, Tensor, Tensor] | None = None  # rows and text of the last call, and what it became

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        layouts = [index for index, layout in enumerate(self.regions.layouts) if layout.regions]
        texts = [without_phrases(self.regions.layouts[index]) for index in layouts]
        self._texts = dict(zip(layouts, encode_texts(self.pipe, texts, arguments), strict=True)) if texts else {}
        self._last = None

    def replace(self, context: CallContext, text: Tensor, active: Collection[int]) -> Tensor | None:
        """``text`` (R, K, C) with the phrases hidden in the rows with the prompt of a layout in ``active``; None if
        there is none. The same tensor as long as all of these are the same."""
        hiding = tuple(layout in active and layout in self._texts for layout in context.guided_layouts)
        if not any(hiding):
            return None
        rows = (context.guided_rows, context.guided_layouts, hiding)
        if self._last is None or self._last[0] != rows or self._last[1] is not text:
            self._last = (rows, text, self._hide(context, text, hiding))
        return self._last[2]

    def _hide(self, context: CallContext, text: Tensor, hiding: tuple[bool, ...]) -> Tensor:
        changed = text.clone()
        for index, layout in enumerate(context.guided_layouts):
            if not hiding[index]:
                continue
            hidden = self._texts[layout].to(text)
            others = torch.ones(min(text.shape[1], len(hidden)), dtype=torch.bool)
            for region in range(len(self.regions.layouts[layout].regions) if self.keep else 0):
                others[self.regions.tokens(layout, region, len(others))] = False
            changed[context.guided_rows.start + index, : len(others)][others] = hidden[: len(others)][others]
        return changed
