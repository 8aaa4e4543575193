"""Negative prompts of regions: what to avoid inside one region only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from localctl.control.base import BoundControl, CallContext, Mixture
from localctl.control.mixing import Pair, TextMixer
from localctl.control.regions import BoundRegionControl, BoundRegions, RegionControl, once_per_call
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout


@dataclass(frozen=True)
class NegativePrompts(RegionControl):
    """Replace the call's negative prompt by each region's ``negative_prompt`` inside the region.

    The cross-attention of the rows of the negative prompt becomes (1 - sum_r m_r) a + sum_r m_r a_r, with a_r the
    layer's output for the text of region r and m_r its mask (divided by their sum where that exceeds 1). The pooled
    text embedding of SDXL stays that of the call. Without guidance, there is no negative prompt, and it is refused.

    Args:
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps).
        mask_resize: how regions are resized to each layer's grid, as for :func:`localctl.masks.resize_mask`.

    Raises:
        ValueError: an unknown ``mask_resize`` or an invalid window; when the pipeline is called, no negative prompt.
    """

    start: float = 0.0
    end: float = 1.0
    mask_resize: str = "area"

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        return _BoundNegatives(self, BoundRegions(pipe, layouts, self.mask_resize))


class _BoundNegatives(BoundRegionControl[NegativePrompts]):
    def __init__(self, control: NegativePrompts, regions: BoundRegions) -> None:
        super().__init__(control, regions)
        self.mixer = TextMixer(regions)

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        super().begin_call(arguments)
        wanted = {key: region.negative_prompt for key, region in self.regions if region.negative_prompt}
        self.mixer.begin_call(self.regions.encode(wanted, arguments))

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        return layer.cross and self.within(context) and bool(self._pairs(context))

    def mixture(self, context: CallContext, layer: AttentionLayer) -> Mixture:
        return self.mixer.mixture(context, layer, self._pairs(context), None, convex=True)

    @once_per_call
    def _pairs(self, context: CallContext) -> list[Pair]:
        """Return the texts to mix in: rows of the negative prompt, regions active in this step."""
        if self.mixer.texts and not context.has_negative:
            name = self.regions.denoiser.name
            raise ValueError(
                f"NegativePrompts changes the negative prompt, but this call with the {name} has none; turn "
                "guidance with a negative prompt on (true_cfg_scale or guidance_scale), or leave NegativePrompts out."
            )
        rows = [row for row, conditional in enumerate(context.conditional) if not conditional]
        return [
            Pair(row, row, (context.layout_of_row[row], index))
            for row in rows
            for index, region in enumerate(self.regions.layouts[context.layout_of_row[row]].regions)
            if (context.layout_of_row[row], index) in self.mixer.texts
            and region.within(context.step, context.num_steps)
        ]
