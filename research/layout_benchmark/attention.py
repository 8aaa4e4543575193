"""Measure where the attention is under a control: on which kinds of tokens, and how much of a phrase's in its box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import BoundControl, CallContext, Control
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout
from localctl.sampling import generate

KINDS = ("phrases", "other words", "start", "end", "padding")


@dataclass(eq=False)
class TokenShares(Control):
    """Records the shares of cross-attention by kind of token, over layers, heads, cells and steps.

    Other controls may be attached with it; it changes nothing.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(len(KINDS), dtype=torch.float64), init=False)
    calls: int = field(default=0, init=False)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        return _BoundShares(self, [token_kinds(pipe, layout) for layout in layouts])

    @property
    def shares(self) -> dict[str, float]:
        """The shares by kind, which add up to 1. Raises ValueError before an image was generated."""
        if not self.calls:
            raise ValueError("No attention was recorded yet; generate an image with this control attached.")
        return dict(zip(KINDS, (self.sums / self.calls).tolist(), strict=True))


class _BoundShares(BoundControl):
    is_reader = True

    def __init__(self, control: TokenShares, kinds: Sequence[Tensor]) -> None:
        self.control, self.kinds = control, kinds

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        return layer.cross

    @torch.no_grad()
    def read_attention(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice, bias: Tensor | None
    ) -> None:
        block = scores.block(queries)  # (n,H,q,K)
        shares = (block if bias is None else block + bias).softmax(dim=-1).mean(dim=(1, 2)).double().cpu()  # (n,K)
        kinds = torch.stack([self.kinds[layout] for layout in context.guided_layouts])  # (n,K,kinds)
        weight = block.shape[2] / layer.cells  # the scores may come in blocks of queries
        self.control.sums += weight * (shares[:, None] @ kinds)[:, 0].mean(dim=0)
        self.control.calls += int(not queries.start)


def token_kinds(pipe: Any, layout: Layout) -> Tensor:
    """Return the kind of each token of the prompt, (K, kinds) float64, 0 or 1."""
    kinds = torch.zeros(pipe.tokenizer.model_max_length, len(KINDS), dtype=torch.float64)
    end = min(len(pipe.tokenizer(layout.prompt, verbose=False).input_ids), len(kinds)) - 1
    kinds[0, KINDS.index("start")] = kinds[end, KINDS.index("end")] = 1
    kinds[end + 1 :, KINDS.index("padding")] = 1
    kinds[1:end, KINDS.index("other words")] = 1
    for positions in denoiser_of(pipe).token_positions(layout):
        kinds[list(positions), KINDS.index("other words")] = 0
        kinds[list(positions), KINDS.index("phrases")] = 1
    return kinds


def attention_of(
    pipe: DiffusionPipeline, layouts: Sequence[Layout], controls: Sequence[Control], seed: int, **options: Any
) -> dict[str, float]:
    """Generate the layouts and return the shares of attention by kind of token, with ``inside`` and ``area``.

    inside: mean share of a phrase's attention in its region; evenly spread attention would give ``area``.
    """
    shares, maps = TokenShares(), AttentionMaps()
    generate(pipe, layouts, [*controls, shares, maps], [seed] * len(layouts), paired=True, **options)
    pairs = [(index, region) for index, layout in enumerate(layouts) for region in range(len(layout.regions))]
    inside = [maps.mass(index, region) for index, region in pairs]
    area = [float(layouts[index].masks((64, 64))[region].mean()) for index, region in pairs]
    count = len(pairs)
    return {**shares.shares, "inside": sum(inside) / count, "area": sum(area) / count}
