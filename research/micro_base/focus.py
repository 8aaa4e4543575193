"""Losses that make the U-Net learn the objects: a larger weight of the error at objects, and attention to their words.

The attention loss follows TokenCompose (arXiv 2312.03626). Without it, a small U-Net attends to the end tokens, whose
states summarise the caption, and ignores for long the words that matter little for the error (shapes).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from localctl.micro.scenes import Scene, scene
from research.micro_base.loop import save_tensors

MOST_OBJECTS = 3
NEAR = 17  # pixels; side of the kernel that dilates objects to the area with a larger weight
NAMED = {1: 0.40, 2: 0.35}  # share of scenes with so many objects and a full caption; the rest are any scenes
LEAST = 1e-4


@dataclass(frozen=True)
class Focus:
    """Objects of n scenes, on the grid of latents.

    masks: fp16 (n, 3, 16, 16), of the objects. near: fp16 (n, 16, 16), the area around all objects. tokens: (n, 3),
    position of each object's colour in the caption, which its shape follows, or -1. odds: (n,), probability of
    sampling the scene, summing to 1.
    """

    masks: Tensor
    near: Tensor
    tokens: Tensor
    odds: Tensor


def tokens_of(item: Scene) -> list[int]:
    """Return where each object's colour and shape are in the caption: position of the first, or -1; 0 = start token."""
    words = item.caption.replace(",", " ,").split()
    pairs = list(itertools.pairwise(words))
    return [pairs.index((o.color, o.shape)) + 1 if (o.color, o.shape) in pairs else -1 for o in item.objects]


def make_focus(count: int, path: Path, profile: str = "basic", side: int = 16) -> Focus:
    """Return the objects of the first ``count`` training scenes, cached in the file ``path``."""
    if path.exists():
        # The file is a cache of this program, but the folder may be from anybody: unpickle nothing but tensors.
        return Focus(**torch.load(path, weights_only=True))
    masks, near = torch.zeros(count, MOST_OBJECTS, side, side), torch.zeros(count, side, side)
    tokens, odds = torch.full((count, MOST_OBJECTS), -1), torch.zeros(count, dtype=torch.float64)
    numbers, named = np.zeros(count, int), np.zeros(count, bool)
    for i in tqdm(range(count), desc="finding objects", mininterval=10):
        item = scene(i, profile)
        shapes = np.asarray(item.masks, np.float32)
        wide = cv2.dilate(shapes.max(0), np.ones((NEAR, NEAR)))
        near[i] = torch.from_numpy(cv2.resize(wide, (side, side), interpolation=cv2.INTER_AREA))
        for number, shape in enumerate(shapes):
            masks[i, number] = torch.from_numpy(cv2.resize(shape, (side, side), interpolation=cv2.INTER_AREA))
        tokens[i, : len(shapes)] = torch.tensor(tokens_of(item))
        numbers[i], named[i] = len(shapes), "background" in item.caption
    odds += (1 - sum(NAMED.values())) / count
    for number, share in NAMED.items():
        chosen = torch.from_numpy(named & (numbers == number))
        odds[chosen] += share / max(1, int(chosen.sum()))
    content = {"masks": masks.half(), "near": near.half(), "tokens": tokens, "odds": odds / odds.sum()}
    save_tensors(path, content)
    return Focus(**content)


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
        weights = torch.softmax(query @ key.transpose(1, 2) * attn.scale, dim=-1)  # (B heads, pixels, tokens)
        self.recorded.append(weights.unflatten(0, (-1, attn.heads)).mean(1))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(weights @ value)))


def record_attention(unet: nn.Module) -> list[Tensor]:
    """Return a list to which each cross-attention layer appends its weights in every pass; the caller clears it."""
    recorded: list[Tensor] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(RecordingProcessor(recorded))
    return recorded


def focus_loss(recorded: list[Tensor], masks: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss, share), means over places, then samples, then layers.

    loss: -log of the attention from objects to their own words, plus -log of the attention from elsewhere to anything
    but objects' words. share: the attention from objects to their own words.

    recorded: of :func:`record_attention`. masks: (B, 3, H, W) in [0, 1]. tokens: (B, 3) as in :class:`Focus`. weight:
    (B,) of each sample.
    """
    there = (tokens >= 0)[..., None]  # (B, 3, 1)
    loss, share = torch.zeros(()), torch.zeros(())
    for attention in recorded:
        side = int(attention.shape[1] ** 0.5)
        first = tokens.clamp(min=0)[:, None].expand(-1, attention.shape[1], -1)  # (B, P, 3)
        own = (attention.gather(2, first) + attention.gather(2, first + 1)).transpose(1, 2) * there  # (B, 3, P)
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
