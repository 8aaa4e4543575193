"""Dense modulation: pull attention scores towards a layout of segments, within their own range of values.

The method of DenseDiffusion (arXiv 2308.12964, eq. 3-5). For each query i and key j with score s_ij,

    s'_ij = s_ij + lambda_i * (max_k s_ik - s_ij)   where i and j belong together,
    s'_ij = s_ij - lambda_i * (s_ij - min_k s_ik)   elsewhere,
    lambda_i = w * (t / 1000)^decay * (1 - size_regularisation * area_i),   decay = 5 as published.

In cross-attention a cell belongs to the tokens of its segment's phrase, in self-attention to the cells of its segment;
area_i is the share of the image that the segments of cell i cover. The rows of the negative prompt stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.base import BoundControl, CallContext, Factors, check_choice, check_strength
from localctl.control.regions import BoundRegionControl, BoundRegions, RegionControl, once_per_call
from localctl.control.segments import RESTS, Classes
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region
from localctl.prompt_syntax import WeightedText


@dataclass(frozen=True)
class DenseModulation(RegionControl):
    """Modulate self- and cross-attention towards the regions, which are meant to cover most of the image.

    Args:
        w_cross, w_self: weights of the modulation of cross- and self-attention, w_c and w_s of the paper; a region's
            strength multiplies them. 0 = no effect. In [0, 2], as on the published page; up to 1, scores stay in their
            range, beyond it they may leave it while t is large.
        size_regularisation: 1 = large segments are modulated less, by their area; 0 = all are modulated equally.
        decay: exponent of t / 1000, at least 0; the larger, the sooner the modulation fades as t falls, 0 = not at all.
            Small latents settle their layout at a lower t than the latents for which the published 5 was chosen.
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps); by default
            the first 30 %.
        hide_phrases: while active, encode all tokens but the phrases' own from the prompt without the phrases, as for
            :class:`~localctl.control.RegionBias`.
        separate_texts: give each phrase's tokens the embedding of the phrase alone, as published, in all steps.
        rest: treatment of the cells that no region covers. ``published`` lowers all their scores, which flattens their
            attention; ``segment`` makes them one more segment, with the remaining words; ``free`` only lowers their
            scores for the phrases and for the segments of others. The latter two suit layouts of a few boxes.
        mask_resize: how regions are resized to each layer's grid, as for :class:`~localctl.control.RegionBias`.
        memory_limit: MiB that the scores of one layer may take; queries are processed in parts to stay below it. May be
            infinite.

    Raises:
        ValueError: a weight or limit out of range, or an invalid window; when attached, as for
            :func:`localctl.tokens.token_positions`.
    """

    w_cross: float = 1.0
    w_self: float = 0.3
    size_regularisation: float = 1.0
    decay: float = 5.0
    start: float = 0.0
    end: float = 0.3
    separate_texts: bool = True
    hide_phrases: bool = False
    rest: str = "published"
    mask_resize: str = "nearest"
    memory_limit: float = 256.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("w_cross", 2), ("w_self", 2), ("size_regularisation", 1)):
            check_strength(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} of DenseModulation must lie in [0, {most}], not {getattr(self, name)}; that is the "
                    "published range."
                )
        check_strength("decay", self.decay)
        if self.decay < 0:
            raise ValueError(f"The decay of DenseModulation must be at least 0, not {self.decay}.")
        check_choice("rest", self.rest, RESTS)
        if not self.memory_limit > 0:
            raise ValueError(f"The memory_limit must be a positive number of MiB, not {self.memory_limit}.")

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        self.check_strengths(layouts)
        return _BoundDense(self, BoundRegions(pipe, layouts, self.mask_resize), pipe.scheduler)


class _BoundDense(BoundRegionControl[DenseModulation]):
    def __init__(self, control: DenseModulation, regions: BoundRegions, scheduler: Any) -> None:
        super().__init__(control, regions)
        self.timesteps = scheduler.config.num_train_timesteps
        # (layout, region) -> its phrase alone: the positions of its tokens, and their embeddings (tokens, C)
        self._texts: dict[tuple[int, int], tuple[tuple[int, ...], Tensor]] = {}
        self._last: tuple[Any, Tensor, Tensor] | None = None  # rows and text of the last call, and the text returned

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        super().begin_call(arguments)
        self._texts, self._last = {}, None
        if not self.control.separate_texts or self.control.w_cross == self.control.w_self == 0:
            return
        wanted = {key: self.regions.phrase(*key) for key, region in self.regions if region.phrase and region.strength}
        for key, text in self.regions.encode(wanted, arguments).items():  # (77, C) each
            phrase = words.text if isinstance(words := wanted[key], WeightedText) else words
            alone = Layout(phrase, regions=(Region(phrase, (0, 0, 1, 1)),))
            places = self.regions.denoiser.token_positions(alone)[0]
            self._texts[key] = places, text[list(places)]

    def text(self, context: CallContext, text: Tensor) -> Tensor | None:
        hidden = super().text(context, text) if self.control.w_cross or self.control.w_self else None
        if not self._texts:
            return hidden
        given, rows = text if hidden is None else hidden, (context.guided_rows, context.guided_layouts)
        if self._last is None or self._last[0] != rows or self._last[1] is not given:
            self._last = (rows, given, self._separated(context, given))
        return self._last[2]

    def _separated(self, context: CallContext, text: Tensor) -> Tensor:
        """Return ``text`` (R, K, C) with each phrase's tokens embedded alone, in the rows with the prompt."""
        changed = text.clone()
        rows = range(context.guided_rows.start, context.guided_rows.stop)
        for row, layout in zip(rows, context.guided_layouts, strict=True):
            for index in range(len(self.regions.layouts[layout].regions)):
                if (layout, index) in self._texts:
                    places, alone = self._texts[layout, index]
                    pairs = self.regions.denoiser.same_tokens(places, self.regions.tokens(layout, index, text.shape[1]))
                    chosen = [places.index(place) for place, _ in pairs]
                    changed[row, [own for _, own in pairs]] = alone.to(text)[chosen]
        return changed

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        weight = self.control.w_cross if layer.cross else self.control.w_self
        return bool(weight) and bool(self._active(context))

    def max_queries(self, layer: AttentionLayer, scores: Scores) -> int:
        # Four float32 tensors of this size at once: scores, their target, the mask of all rows, the processor's own.
        return self._queries(layer, scores, 4 * scores.batch)

    def _queries(self, layer: AttentionLayer, scores: Scores, rows: int) -> int:
        """Return for how many queries float32 scores of so many rows stay within the memory limit."""
        per_query = 4 * rows * scores.number * scores.keys
        return max(1, int(min(self.control.memory_limit * 2**20 / per_query, layer.cells)))

    def attention_factors(self, context: CallContext, layer: AttentionLayer, scores: Scores) -> Factors | None:
        tables = self._tables(context, layer)
        if tables is None:
            return None
        # With p = lambda_i: (1 - p) s + p max where together, else (1 - p) s + p min; less p min, for the whole query.
        amount, together, member, *free = tables
        low, high = self._range(layer, scores)  # (n,H,Q,1)
        portion = self._amount(context, layer) * amount
        left = (portion * (high - low)) * together  # (n,H,Q,p)
        if not free:
            return Factors(1 - portion, left, member)
        alone, loose = free
        return Factors(1 - portion, left - (portion * low) * alone, member, portion, loose)

    def _tables(self, context: CallContext, layer: AttentionLayer) -> tuple[Tensor, ...] | None:
        """Return ``portion`` (n,1,Q,1), ``together`` and ``member`` (n,1,Q,p) of the classes, and if there are loose
        cells also ``alone`` (n,1,Q,p) and ``loose`` (n,1,Q,1); or None where scores have no factors."""

        def make() -> tuple[Tensor, ...] | None:
            classes = self._classes(context, layer).values()
            if not all(one.has_factors for one in classes):
                return None
            names = ["portion", "together", "member"]
            if any(bool(one.loose.any()) for one in classes):
                names += ["alone", "loose"]
            return tuple(self._table(context, layer, name)[:, None] for name in names)

        key = ("tables", layer.size, self._strengths(context), context.guided_layouts, context.device)
        return self.regions.cached(key, make)

    def _range(self, layer: AttentionLayer, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest score of each query, (n, H, Q, 1)."""
        count = self._queries(layer, scores, scores.rows)
        if scores.query.device.type == "cpu":  # blocks that stay in its cache
            count = min(count, max(1, 2**19 // (scores.rows * scores.number * scores.keys)))
        found = []
        for first in range(0, layer.cells, count):
            found.append(_least_and_greatest(scores.block(slice(first, first + count))))
        low, high = (torch.cat(column, dim=2) for column in zip(*found, strict=True))
        return low, high

    def attention_bias(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice
    ) -> Tensor | None:
        if layer.cross:
            signed = self._cross(context, layer, scores.keys)[:, queries]  # (n,q,K)
        else:
            pairs, member = (self._table(context, layer, name) for name in ("pairs", "member"))
            signed = pairs[:, queries] @ member.mT
        block = scores.block(queries)  # (n,H,q,K)
        hidden = None if scores.hidden is None else scores.hidden[scores.guided, None, None]
        low, high = _least_and_greatest(block, hidden)
        target = torch.where(signed[:, None] > 0, high, low)
        return target.sub_(block).mul_((signed.abs() * self._amount(context, layer))[:, None])

    def _amount(self, context: CallContext, layer: AttentionLayer) -> float:
        """Return w * (t / 1000)^decay."""
        weight = self.control.w_cross if layer.cross else self.control.w_self
        return weight * (context.timestep / self.timesteps) ** self.control.decay

    @once_per_call
    def _strengths(self, context: CallContext) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Return each layout of this call with the strengths of its regions in this step."""
        layouts = sorted(set(context.guided_layouts))
        return tuple((layout, self.regions.strengths(layout, context)) for layout in layouts)

    def _classes(self, context: CallContext, layer: AttentionLayer) -> dict[int, Classes]:
        """Return the classes of cells of each layout of this call."""
        strengths, control = self._strengths(context), self.control

        def make() -> dict[int, Classes]:
            options = control.rest, control.size_regularisation
            return {layout: Classes.of(self.regions.masks(layout, layer), own, *options) for layout, own in strengths}

        return self.regions.cached(("classes", layer.size, strengths), make)

    def _table(self, context: CallContext, layer: AttentionLayer, name: str) -> Tensor:
        """Return a table of :class:`Classes` for each row with the prompt, (n, Q, 1 or p)."""
        classes = self._classes(context, layer)
        width = max(one.count for one in classes.values())
        key = (name, layer.size, self._strengths(context))
        found = self.regions.per_row(context, key, lambda layout: classes[layout].table(name, width))
        assert found is not None
        return found

    def _cross(self, context: CallContext, layer: AttentionLayer, keys: int) -> Tensor:
        """Return lambda_i / (w (t/1000)^decay), (n,Q,K), negative where a cell and a token do not belong together."""

        def make(layout: int) -> Tensor:
            words = torch.zeros(len(self.regions.layouts[layout].regions) + 1, keys)  # the last is the rest
            for index in range(len(words) - 1):
                words[index, self.regions.tokens(layout, index, keys)] = 1
            return self._classes(context, layer)[layout].cross(words)

        key = ("cross", layer.size, keys, self._strengths(context))
        found = self.regions.per_row(context, key, make)
        assert found is not None
        return found


def _least_and_greatest(block: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest score of each query, (n, H, q, 1), over all keys but ``hidden`` (n,1,1,K)."""
    if hidden is not None:
        infinity = torch.finfo(block.dtype).max
        low = block.masked_fill(hidden, infinity).amin(dim=-1, keepdim=True)
        return low, block.masked_fill(hidden, -infinity).amax(dim=-1, keepdim=True)
    if block.device.type == "cpu":  # where aminmax takes about three times as long
        return block.amin(dim=-1, keepdim=True), block.amax(dim=-1, keepdim=True)
    low, high = block.aminmax(dim=-1, keepdim=True)
    return low, high
