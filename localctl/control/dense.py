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
from localctl.control.base import BoundControl, CallContext, check_choice, check_strength
from localctl.control.regions import BoundRegionControl, BoundRegions, RegionControl
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region

RESTS = ("published", "segment", "free")


@dataclass(frozen=True)
class DenseModulation(RegionControl):
    """Modulate self- and cross-attention towards the regions, which are meant to cover most of the image.

    Args:
        w_cross, w_self: weights of the modulation of cross- and self-attention, w_c and w_s of the paper; a region's
            strength multiplies them. 0 = no effect. In [0, 1], so that scores stay in their range.
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
        for name in ("w_cross", "w_self", "size_regularisation"):
            check_strength(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} of DenseModulation must lie in [0, 1], not {getattr(self, name)}; beyond, scores would "
                    "leave their range."
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


@dataclass(frozen=True)
class _Segments:
    """The segments of all rows with the prompt on a layer's grid; s: the number of segments, including the rest."""

    member: Tensor  # (n,s,Q) 0 or 1
    strength: Tensor  # (n,s,1)
    size: Tensor  # (n,Q,1): 1 - size_regularisation * area_i
    own: Tensor  # (n,Q,1): the strength of each cell's own segments
    free: Tensor  # (n,Q,1): the amount for tokens of no phrase, -own, own or 0

    def cross(self, words: Tensor, queries: slice) -> Tensor:
        """Return lambda_i / (w (t/1000)^decay), (n,q,K), negative where a cell and a token do not belong together.

        ``words`` (n,s,K): 1 where a token belongs to a segment's phrase.
        """
        member = self.member[:, :, queries].transpose(1, 2)  # (n,q,s)
        inside = member @ (words * self.strength)
        outside = (1 - member) @ (words * self.strength)
        others = 1 - words.amax(dim=1, keepdim=True)  # (n,1,K): tokens of no phrase
        return (inside - outside + others * self.free[:, queries]) * self.size[:, queries]

    def self_(self, queries: slice) -> Tensor:
        """Return the same for pairs of cells, (n,q,Q)."""
        member = self.member[:, :, queries].transpose(1, 2)  # (n,q,s)
        together = (member @ self.member) > 0
        inside = torch.zeros_like(together, dtype=member.dtype)
        for index in range(self.member.shape[1]):
            pair = member[:, :, index, None] * (self.member[:, index, None] * self.strength[:, index, None])
            inside = torch.maximum(inside, pair)
        return torch.where(together, inside, -self.own[:, queries]) * self.size[:, queries]


class _BoundDense(BoundRegionControl[DenseModulation]):
    def __init__(self, control: DenseModulation, regions: BoundRegions, scheduler: Any) -> None:
        super().__init__(control, regions)
        self.timesteps = scheduler.config.num_train_timesteps
        self._texts: dict[tuple[int, int], Tensor] = {}  # (layout, region) -> (tokens, C)
        self._segments: tuple[Any, _Segments | None] = (None, None)

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        super().begin_call(arguments)
        self._texts = {}
        if not self.control.separate_texts or self.control.w_cross == self.control.w_self == 0:
            return
        wanted = {key: region.phrase for key, region in self.regions if region.phrase and region.strength}
        for key, text in self.regions.encode(wanted, arguments).items():  # (77, C) each
            alone = Layout(wanted[key], regions=(Region(wanted[key], (0, 0, 1, 1)),))
            self._texts[key] = text[list(self.regions.denoiser.token_positions(alone)[0])]

    def text(self, context: CallContext, text: Tensor) -> Tensor | None:
        hidden = super().text(context, text) if self.control.w_cross or self.control.w_self else None
        if not self._texts:
            return hidden
        changed = (text if hidden is None else hidden).clone()
        rows = range(context.guided_rows.start, context.guided_rows.stop)
        for row, layout in zip(rows, context.guided_layouts, strict=True):
            for index in range(len(self.regions.layouts[layout].regions)):
                if (layout, index) in self._texts:
                    alone = self._texts[layout, index].to(text)
                    positions = self.regions.tokens(layout, index, text.shape[1])[: len(alone)]
                    changed[row, positions] = alone[: len(positions)]
        return changed

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        weight = self.control.w_cross if layer.cross else self.control.w_self
        return bool(weight) and bool(self._active(context))

    def max_queries(self, layer: AttentionLayer, scores: Scores) -> int:
        # Four float32 tensors of this size at once: scores, their target, the mask of all rows, the processor's own.
        per_query = 4 * 4 * scores.hidden_states.shape[0] * scores.attn.heads * scores.keys
        return max(1, int(min(self.control.memory_limit * 2**20 / per_query, layer.cells)))

    def attention_bias(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice
    ) -> Tensor | None:
        segments = self._segments_at(context, layer)
        if layer.cross:
            signed = segments.cross(self._words(context, segments, scores.keys), queries)
        else:
            signed = segments.self_(queries)  # (n,q,K)
        weight = self.control.w_cross if layer.cross else self.control.w_self
        amount = weight * (context.timestep / self.timesteps) ** self.control.decay
        block = scores.block(queries)  # (n,H,q,K)
        low, high = block.aminmax(dim=-1, keepdim=True)
        target = torch.where(signed[:, None] > 0, high, low)
        return target.sub_(block).mul_(signed.abs_().mul_(amount)[:, None])

    def _segments_at(self, context: CallContext, layer: AttentionLayer) -> _Segments:
        """Return the segments on the layer's grid; the last result is cached for the parts of a layer's queries."""
        strengths = tuple(self.regions.strengths(layout, context) for layout in context.guided_layouts)
        key = (layer.size, context.guided_layouts, strengths, context.device)
        if self._segments[0] != key or self._segments[1] is None:
            self._segments = (key, self._make_segments(context, layer, strengths))
        assert self._segments[1] is not None
        return self._segments[1]

    def _make_segments(
        self, context: CallContext, layer: AttentionLayer, strengths: tuple[tuple[float, ...], ...]
    ) -> _Segments:
        count = max(len(row) for row in strengths) + 1  # the last is the rest
        member = torch.zeros(len(strengths), count, layer.cells)
        strength = torch.zeros(len(strengths), count, 1)
        for row, (layout, values) in enumerate(zip(context.guided_layouts, strengths, strict=True)):
            masks = self.regions.masks(layout, layer)  # (r,Q)
            if not len(masks):
                continue
            member[row, : len(masks)] = (masks >= 0.5 * masks.amax(dim=1, keepdim=True)).float()
            strength[row, : len(masks), 0] = torch.tensor(values)
            strength[row, -1] = max(values)
        covered = member.amax(dim=1)  # (n,Q)
        own = torch.where(covered > 0, (member * strength).amax(dim=1), strength[:, -1])
        rest = {"published": -1.0, "segment": 1.0, "free": 0.0}[self.control.rest]
        if self.control.rest == "segment":
            member[:, -1] = 1 - covered
        area = (member * member.mean(dim=2, keepdim=True)).sum(dim=1)  # (n,Q)
        if self.control.rest == "free":
            # One more segment with strength 0, which leaves the scores among its cells unchanged.
            member[:, -1], strength[:, -1] = 1 - covered, 0
        size = (1 - self.control.size_regularisation * area).clamp(min=0)
        free = torch.where(covered > 0, -own, rest * own)
        found = (member, strength, size[..., None], own[..., None], free[..., None])
        tensors = (tensor.to(context.device) for tensor in found)
        return _Segments(*tensors)

    def _words(self, context: CallContext, segments: _Segments, keys: int) -> Tensor:
        """Return (n,s,K): 1 where a token belongs to a segment's phrase."""

        def make(layout: int) -> Tensor:
            words = torch.zeros(segments.member.shape[1], keys)
            for index in range(len(self.regions.layouts[layout].regions)):
                words[index, self.regions.tokens(layout, index, keys)] = 1
            return words

        words = self.regions.per_row(context, ("words", segments.member.shape[1], keys), make)
        assert words is not None
        return words
