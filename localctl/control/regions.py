"""What the region methods share: the regions of each row as masks on a site's grid, and as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from localctl.control.attention import Site
from localctl.control.base import CallContext
from localctl.layout import Layout
from localctl.pipelines import encode_prompts
from localctl.tokens import positions_of


def encode_texts(pipe: Any, texts: Sequence[str], arguments: Mapping[str, Any]) -> Tensor:
    """Encode texts to (n, K, C) with the settings of a running call; ``arguments``: of its ``encode_prompt``."""
    return encode_prompts(pipe, list(texts), call=arguments)[0].states


class BoundRegions:
    """The regions of the layouts of one ``attach``; what depends on the grid alone is computed once and kept.

    ValueError when phrases and tokens do not fit together.
    """

    def __init__(self, pipe: Any, layouts: Sequence[Layout], mask_resize: str) -> None:
        self.layouts = tuple(layouts)
        self.mask_resize = mask_resize
        self.positions = [positions_of(pipe, layout) for layout in layouts]
        self._masks: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self._rows: dict[Any, Tensor | None] = {}

    def masks(self, layout: int, site: Site) -> Tensor:
        """(n, Q) float32 on the CPU: each region of a layout on the site's grid."""
        key = (layout, site.size)
        if key not in self._masks:
            self._masks[key] = self.layouts[layout].masks(site.size, self.mask_resize).flatten(1)
        return self._masks[key]

    def strengths(self, layout: int, context: CallContext) -> tuple[float, ...]:
        """The strength of each region in this step: its own within its window, else 0."""
        regions = self.layouts[layout].regions
        return tuple(region.strength if region.within(context.step, context.num_steps) else 0.0 for region in regions)

    def tokens(self, layout: int, region: int, keys: int) -> list[int]:
        """The positions of a region's phrase among ``keys`` tokens."""
        return [position for position in self.positions[layout][region] if position < keys]

    def per_row(
        self, context: CallContext, key: tuple[Any, ...], make: Callable[[int], Tensor | None]
    ) -> Tensor | None:
        """``make(layout)`` for each row with the prompt, stacked (n, ...) on the call's device; None if all are None.

        Rows without one are zero. ``key`` says what the result depends on apart from rows and device; a few are kept.
        """
        full = (key, context.guided_layouts, context.device)
        if full not in self._rows:
            made = {layout: make(layout) for layout in set(context.guided_layouts)}
            some = next((tensor for tensor in made.values() if tensor is not None), None)
            stacked = None
            if some is not None:
                empty = torch.zeros_like(some)
                rows = [made[layout] for layout in context.guided_layouts]
                stacked = torch.stack([empty if row is None else row for row in rows]).to(context.device)
            while len(self._rows) >= 64:  # sites x windows of one run; other sizes may follow
                self._rows.pop(next(iter(self._rows)))
            self._rows[full] = stacked
        return self._rows[full]
