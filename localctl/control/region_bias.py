"""Region bias: a phrase's cross-attention scores are raised inside its region and lowered outside.

The method of DiffusionSpatialControl ("paint with words" with a scale that follows the scores): the attention is

    softmax(scores + S * sigma * std(scores)),   S = strength inside the region, -outside_strength outside,

for the tokens of the region's phrase, 0 for all others; sigma is the noise level of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.cells import CELL_MODES
from localctl.control.attention import Moments, Scores, Site
from localctl.control.base import BoundControl, CallContext, Control, check_window
from localctl.control.hidden_phrases import HiddenPhrases
from localctl.control.regions import BoundRegions
from localctl.layout import Layout

STD_FORMS = ("sample", "global")


@dataclass(frozen=True)
class RegionBias(Control):
    """Draw each phrase's attention into its region.

    Args:
        strength, outside_strength: multiply those of the regions; 0 = no effect. Both may be negative.
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps); each
            region's own window applies within it. The noise level sigma fades the effect out by itself.
        std: ``sample``, of each picture's own scores, over heads and entries, so that a picture does not depend on its
            batch; ``global``, as published, over the whole batch with both halves of guidance.
        mask_resize: how regions are brought to each layer's grid: ``area`` gives border cells their share; ``centre``
            is the published form; or as :func:`localctl.masks.resize_mask`.
        hide_phrases: while active, encode all tokens but the phrases' own from the prompt without the phrases, so that
            cells outside a region read nothing of its object in the other words, the end and the padding.

    Raises:
        ValueError: an unknown form, a strength that is no finite number, or a window that is none; when attached, as
            for :func:`localctl.phrases.token_positions`.
    """

    strength: float = 0.5
    outside_strength: float = 0.0
    start: float = 0.0
    end: float = 1.0
    std: str = "sample"
    mask_resize: str = "area"
    hide_phrases: bool = False

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        if self.std not in STD_FORMS:
            raise ValueError(f"Unknown std {self.std!r}; choose one of {', '.join(STD_FORMS)}.")
        if self.mask_resize not in CELL_MODES:
            raise ValueError(f"Unknown mask resize {self.mask_resize!r}; choose one of {', '.join(CELL_MODES)}.")
        for name in ("strength", "outside_strength"):
            check_strength(name, getattr(self, name))

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        regions = BoundRegions(pipe, layouts, self.mask_resize)
        return _BoundRegionBias(self, regions, HiddenPhrases(pipe, regions) if self.hide_phrases else None)


def check_strength(name: str, value: float) -> None:
    """ValueError unless ``value`` is a number that is finite in float32, too."""
    if not isinstance(value, (int, float)) or not torch.isfinite(torch.tensor(float(value))):
        raise ValueError(f"The {name} of a control is a finite number, not {value!r} (of float32, up to 3.4e38).")


class _BoundRegionBias(BoundControl):
    def __init__(self, control: RegionBias, regions: BoundRegions, hidden: HiddenPhrases | None) -> None:
        self.control = control
        self.regions = regions
        self.hidden = hidden
        self._keys: dict[str, tuple[Tensor, slice, Moments]] = {}  # by site: of which text and rows, the keys' moments

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        self._keys = {}
        if self.hidden is not None:
            self.hidden.begin_call(arguments)

    def text(self, context: CallContext, text: Tensor) -> Tensor | None:
        return None if self.hidden is None else self.hidden.replace(context, text, self._active(context))

    def attends(self, context: CallContext, site: Site) -> bool:
        return site.cross and bool(self._active(context))

    def attention_bias(self, context: CallContext, site: Site, scores: Scores, queries: slice) -> Tensor | None:
        active = tuple(self._weights(layout, context) for layout in context.guided_layouts)
        keys = scores.keys
        region_map = self.regions.per_row(
            context, (site.size, keys, active), lambda layout: self._map(layout, context, site, keys)
        )  # (n,Q,K): S of every cell and token
        if region_map is None:
            return None
        if self.control.std == "global":
            std = scores.global_std
        else:
            self._share_key_moments(site, scores)
            std = scores.std[:, None, None, None]
        return region_map[:, None, queries] * (context.sigma * std)  # (n,1,q,K)

    def _share_key_moments(self, site: Site, scores: Scores) -> None:
        """The text is one tensor for all steps of a call, and so are the keys and their moments."""
        text, rows, moments = self._keys.get(site.name, (None, None, None))
        if text is scores.source and rows == scores.guided and moments is not None:
            scores.key_moments = moments
        elif not torch.is_grad_enabled():
            self._keys[site.name] = scores.source, scores.guided, scores.key_moments

    def _weights(self, layout: int, context: CallContext) -> tuple[tuple[float, float], ...]:
        """(S inside, S outside) of each region in this step."""
        control, weights = self.control, []
        for region in self.regions.layouts[layout].regions:
            active = bool(region.phrase) and region.within(context.step, context.num_steps)
            inside, outside = control.strength * region.strength, -control.outside_strength * region.outside_strength
            weights.append((inside, outside) if active else (0.0, 0.0))
        return tuple(weights)

    def _active(self, context: CallContext) -> set[int]:
        """The layouts that are steered in this step."""
        if not context.within(self.control.start, self.control.end):
            return set()
        layouts = set(context.guided_layouts)
        return {layout for layout in layouts if any(any(pair) for pair in self._weights(layout, context))}

    def _map(self, layout: int, context: CallContext, site: Site, keys: int) -> Tensor | None:
        weights = self._weights(layout, context)
        if not any(any(pair) for pair in weights):
            return None
        result = torch.zeros(site.cells, keys)
        for index, (mask, (inside, outside)) in enumerate(zip(self.regions.masks(layout, site), weights, strict=True)):
            for position in self.regions.tokens(layout, index, keys):
                result[:, position] = mask * inside + (1 - mask) * outside
        return result
