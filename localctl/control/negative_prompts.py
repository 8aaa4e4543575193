"""Negative prompts of regions: what to avoid at one place only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.cells import CELL_MODES
from localctl.control.attention import Site
from localctl.control.base import Attend, BoundControl, CallContext, Control, check_window
from localctl.control.regions import BoundRegions, encode_texts
from localctl.layout import Layout


@dataclass(frozen=True)
class NegativePrompts(Control):
    """Inside its region, each region's ``negative_prompt`` takes the place of the call's.

    The cross-attention of the rows of the negative prompt becomes (1 - sum_r m_r) a + sum_r m_r a_r, with a_r the
    layer's output for the text of region r and m_r its mask (over their sum, where that passes 1). The pooled text
    embedding of SDXL stays that of the call. Without classifier-free guidance there is nothing to do.

    Args:
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps).
        mask_resize: how regions are brought to each layer's grid, as :func:`localctl.masks.resize_mask`.

    Raises:
        ValueError: an unknown ``mask_resize`` or a window that is none.
    """

    start: float = 0.0
    end: float = 1.0
    mask_resize: str = "area"

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        if self.mask_resize not in CELL_MODES:
            raise ValueError(f"Unknown mask resize {self.mask_resize!r}; choose one of {', '.join(CELL_MODES)}.")

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        return _BoundNegatives(self, pipe, BoundRegions(pipe, layouts, self.mask_resize))


class _BoundNegatives(BoundControl):
    def __init__(self, control: NegativePrompts, pipe: DiffusionPipeline, regions: BoundRegions) -> None:
        self.control = control
        self.pipe = pipe
        self.regions = regions
        self._texts: dict[tuple[int, int], Tensor] = {}  # (layout, region) -> (K, C)

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        wanted = {
            (layout, index): region.negative_prompt
            for layout, scene in enumerate(self.regions.layouts)
            for index, region in enumerate(scene.regions)
            if region.negative_prompt
        }
        texts = encode_texts(self.pipe, list(wanted.values()), arguments) if wanted else ()
        self._texts = dict(zip(wanted, texts, strict=True))

    def attends(self, context: CallContext, site: Site) -> bool:
        return site.cross and context.within(self.control.start, self.control.end) and bool(self._pairs(context))

    def mix_attention(self, context: CallContext, site: Site, output: Tensor, attend: Attend) -> Tensor | None:
        pairs = self._pairs(context)
        texts = torch.stack([self._texts[context.layout_of_row[row], region] for row, region in pairs])
        local = attend(texts.to(context.device, context.dtype), [row for row, _ in pairs])  # (pairs,Q,C)
        masks = torch.stack([self.regions.masks(context.layout_of_row[row], site)[region] for row, region in pairs])
        masks = masks.to(output.device, output.dtype)[..., None]  # (pairs,Q,1)
        rows = torch.tensor([row for row, _ in pairs], device=output.device)
        total = output.new_zeros(*output.shape[:2], 1).index_add(0, rows, masks)
        share = total.clamp(min=1)
        mixed = output * (1 - total / share)
        return mixed.index_add(0, rows, local * (masks / share[rows]))

    def _pairs(self, context: CallContext) -> list[tuple[int, int]]:
        """(row, region) of all texts to mix in: rows of the negative prompt, regions in their window."""
        rows = [row for row, conditional in enumerate(context.conditional) if not conditional]
        return [
            (row, index)
            for row in rows
            for index, region in enumerate(self.regions.layouts[context.layout_of_row[row]].regions)
            if (context.layout_of_row[row], index) in self._texts and region.within(context.step, context.num_steps)
        ]
