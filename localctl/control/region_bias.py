"""Region bias: raise a phrase's cross-attention scores inside its region and lower them outside.

The method of DiffusionSpatialControl ("paint with words", scaled by the spread of the scores). The attention is

    softmax(scores + S * sigma * std(scores)),

where, for the tokens of the region's phrase, S = strength inside the region and -outside_strength outside; S = 0 for
all other tokens. sigma is the noise level of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.base import BoundControl, CallContext, check_choice, check_strength
from localctl.control.regions import BoundRegionControl, BoundRegions, RegionControl, once_per_call
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout

STD_FORMS = ("sample", "global")


@dataclass(frozen=True)
class RegionBias(RegionControl):
    """Raise each phrase's attention inside its region.

    Args:
        strength, outside_strength: multiplied by those of the regions; 0 = no effect. Both may be negative.
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps); each
            region's own window applies within it. The effect also fades with the noise level sigma.
        std: ``sample``: of each image's own scores, over heads and entries, so that an image does not depend on its
            batch; ``global``, as published: over the whole batch with both halves of guidance.
        mask_resize: how regions are resized to each layer's grid: ``area`` weights border cells by their covered share;
            ``centre`` is the published form; others as for :func:`localctl.masks.resize_mask`.
        hide_phrases: while active, encode all tokens but the phrases' own from the prompt without the phrases, so that
            cells outside a region do not read its object from the other words, the end token or the padding.

    Raises:
        ValueError: an unknown ``std`` or ``mask_resize``, a strength that is not finite, or an invalid window; when
            attached, as for :func:`localctl.tokens.token_positions`.
    """

    strength: float = 0.5
    outside_strength: float = 0.0
    start: float = 0.0
    end: float = 1.0
    std: str = "sample"
    mask_resize: str = "area"
    hide_phrases: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("std", self.std, STD_FORMS)
        for name in ("strength", "outside_strength"):
            check_strength(name, getattr(self, name))

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        return _BoundRegionBias(self, BoundRegions(pipe, layouts, self.mask_resize))


class _BoundRegionBias(BoundRegionControl[RegionBias]):
    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        return layer.cross and bool(self._active(context))

    def attention_bias(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice
    ) -> Tensor | None:
        keys = scores.keys
        region_map = self.regions.per_row(
            context,
            (layer.size, keys, self._all_weights(context)),
            lambda layout: self._map(layout, context, layer, keys),
        )  # (n,Q,K'): S for each cell and token
        if region_map is None:
            return None
        std = scores.global_std if self.control.std == "global" else scores.std[:, None, None, None]
        return (region_map[:, None, queries] * (context.sigma * std))[..., :keys]  # (n,1,q,K)

    def _weights(self, layout: int, context: CallContext) -> tuple[tuple[float, float], ...]:
        """Return (S inside, S outside) of each region in this step."""
        control, weights = self.control, []
        for region in self.regions.layouts[layout].regions:
            active = bool(region.phrase) and region.within(context.step, context.num_steps)
            inside, outside = control.strength * region.strength, -control.outside_strength * region.outside_strength
            weights.append((inside, outside) if active else (0.0, 0.0))
        return tuple(weights)

    @once_per_call
    def _all_weights(self, context: CallContext) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Return the weights of each row with the prompt."""
        return tuple(self._weights(layout, context) for layout in context.guided_layouts)

    def steers(self, layout: int, context: CallContext) -> bool:
        return any(any(pair) for pair in self._weights(layout, context))

    def _map(self, layout: int, context: CallContext, layer: AttentionLayer, keys: int) -> Tensor | None:
        if not self.steers(layout, context):
            return None
        weights = self._weights(layout, context)
        # Rows of masks that begin at multiples of 8 entries are what the kernels of GPUs take without a copy.
        result = torch.zeros(layer.cells, keys + -keys % 8)
        for index, (mask, (inside, outside)) in enumerate(zip(self.regions.masks(layout, layer), weights, strict=True)):
            for position in self.regions.tokens(layout, index, keys):
                result[:, position] = mask * inside + (1 - mask) * outside
        return result
