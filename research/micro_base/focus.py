"""Losses that make the U-Net learn the objects: a larger weight of the error at objects, and attention to their words.

The attention loss follows TokenCompose (arXiv 2312.03626). Without it, a small U-Net attends to the end tokens, whose
states summarise the caption, and ignores for long the words that matter little for the error (shapes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localctl.micro.shapes import BACKGROUNDS, COLORS
from research.micro_base.data import in_blocks
from research.micro_base.loop import save_tensors
from research.micro_base.objects import SIDES, Objects, objects_of, roles_of

MIX = (0.40, 0.35, 0.0)  # share of scenes with 1, 2 and 3 objects and a full caption; the rest are any scenes
LEAST = 1e-4


@dataclass(frozen=True)
class Focus:
    """Objects of n scenes, on the grid of latents: masks, near and tokens as in ``research.micro_base.objects``, fp16.

    relations: (n,), position of the word of the relation, where it tells of the first object, or -1. odds: (n,),
    probability of sampling the scene, summing to 1. expected: of :func:`expected_latents`, or empty.
    """

    masks: Tensor
    near: Tensor
    tokens: Tensor
    relations: Tensor
    odds: Tensor
    expected: Tensor


def make_focus(
    count: int, path: Path, mix: Sequence[float] = MIX, related: float = 0.0, workers: int | None = None
) -> Focus:
    """Return the objects of the first ``count`` basic training scenes, which are cached in the file ``path``.

    mix: share of scenes sampled with 1, 2 and 3 objects and a full caption. related: share of scenes sampled with a
    relation; above 0, its word counts as one of the first object's, at all timesteps.
    """
    if not path.exists():
        blocks = [block for _, block in in_blocks(objects_of, "basic", "train", count, workers, "finding objects")]
        names = [field.name for field in fields(Objects)]
        save_tensors(path, {n: torch.from_numpy(np.concatenate([getattr(b, n) for b in blocks])) for n in names})
    # The file is a cache of this program, but the folder may be from anybody: unpickle nothing but tensors.
    content = torch.load(path, weights_only=True)
    numbers, named = content.pop("numbers"), content.pop("named")
    odds = torch.full((count,), (1 - sum(mix) - related) / count, dtype=torch.float64)
    has_relation = content["relations"] >= 0
    odds[has_relation] += related / max(1, int(has_relation.sum()))
    if not related:
        content["relations"] = torch.full_like(content["relations"], -1)
    for number, share in enumerate(mix, start=1):
        chosen = named & (numbers == number)
        odds[chosen] += share / max(1, int(chosen.sum()))
    return Focus(**content, odds=odds / odds.sum(), expected=torch.zeros(0))


def expected_latents(latents: Tensor, captions: Sequence[str]) -> Tensor:
    """Return ``latents`` (n, 4, 16, 16), with those of captions that state a relation and a background replaced by the
    mean of scenes with such a caption: a linear function of the background, and of the colour on each side.

    With so much noise that it hides the scene, the mean is what the U-Net learns to predict. A relation accounts for a
    fortieth of the squared error against single scenes, so that it is learned slowly from these.
    """
    colors, backgrounds = list(COLORS), list(BACKGROUNDS)
    rows, features = [], []
    for row, caption in enumerate(captions):
        roles, words = roles_of(caption), ["", *caption.split()]
        if roles is None or words[-1] != "background":
            continue
        vector = torch.zeros(len(backgrounds) + 4 * len(colors), dtype=torch.float64)
        vector[backgrounds.index(words[-2])] = 1
        for side, place in zip(SIDES[roles[3]], (roles[0], roles[2]), strict=True):
            vector[len(backgrounds) + side * len(colors) + colors.index(words[place])] = 1
        rows.append(row)
        features.append(vector)
    expected = latents.clone()
    if rows:
        x, y = torch.stack(features), latents[rows].flatten(1).double()
        weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        expected[rows] = (x @ weights).unflatten(1, latents.shape[1:]).to(latents.dtype)
    return expected


class RecordingProcessor:
    """An attention processor that appends the mean attention over heads (B, pixels, tokens) to ``recorded``."""

    def __init__(self, recorded: list[Tensor]) -> None:
        self.recorded = recorded

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query, key, value = (
            attn.head_to_batch_dim(layer(states))
            for layer, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        weights = attn.get_attention_scores(query, key)  # (B heads, pixels, tokens)
        self.recorded.append(weights.unflatten(0, (-1, attn.heads)).mean(1, dtype=torch.float32))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(weights @ value)))


def record_attention(unet: nn.Module) -> list[Tensor]:
    """Return a list to which each cross-attention layer appends its weights in every pass; the caller clears it."""
    recorded: list[Tensor] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(RecordingProcessor(recorded))
    return recorded


def focus_loss(
    recorded: list[Tensor], masks: Tensor, tokens: Tensor, relations: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (loss, share), means over places, then samples, then layers.

    loss: -log of the attention from objects to their own words, plus -log of the attention from elsewhere to anything
    but objects' words. share: the attention from objects to their own words.

    recorded: of :func:`record_attention`. masks: (B, 3, H, W) in [0, 1]. tokens: (B, 3), relations: (B,) as in
    :class:`Focus`. weight: (B,) of each sample.
    """
    there = (tokens >= 0)[..., None]  # (B, 3, 1)
    loss, share = weight.new_zeros(()), weight.new_zeros(())
    first_object = (torch.arange(tokens.shape[1], device=tokens.device) == 0)[None, :, None]  # (1, 3, 1)
    for attention in recorded:
        side = int(attention.shape[1] ** 0.5)
        first = tokens.clamp(min=0)[:, None].expand(-1, attention.shape[1], -1)  # (B, P, 3)
        own = (attention.gather(2, first) + attention.gather(2, first + 1)).transpose(1, 2) * there  # (B, 3, P)
        word = attention.gather(2, relations.clamp(min=0)[:, None, None].expand(-1, attention.shape[1], 1))[..., 0]
        own = own + (word * (relations >= 0)[:, None])[:, None] * first_object  # (B, 3, P)
        inside = F.adaptive_avg_pool2d(masks, side).flatten(2) * there  # (B, 3, P)
        outside = (1 - inside.sum(1)).clamp(min=0)  # (B, P)
        to_own = _mean(-own.clamp(min=LEAST).log(), inside)
        astray = _mean(-(1 - own.sum(1)).clamp(min=LEAST).log()[:, None], outside[:, None])
        loss = loss + ((to_own + astray) * weight).mean() / len(recorded)
        share = share + (_mean(own, inside) * weight).sum() / weight.sum().clamp(min=LEAST) / len(recorded)
    return loss, share.detach()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted means (B,) of ``values`` (B, N, P)."""
    return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-3)
