"""Training of the U-Net with an eye on the objects: where they are, their error counts more, and attention from there
goes to their own words.

The second is the idea of TokenCompose (arXiv 2312.03626): left to itself, a small U-Net reads the end of the caption,
where everything is, and words that matter little for the error (shapes) go unread for very long."""

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
NEAR = 17  # pixels: around an object its error counts more, too
NAMED = {1: 0.40, 2: 0.35}  # share of scenes of so many objects whose caption says everything; the rest are any
LEAST = 1e-4


@dataclass(frozen=True)
class Focus:
    """Per scene, on the grid of latents: masks fp16 (n, 3, 16, 16) of the objects; near fp16 (n, 16, 16) around them;
    tokens (n, 3): where in the caption each object's two words begin, or -1; odds (n,) of choosing it, summing to 1."""

    masks: Tensor
    near: Tensor
    tokens: Tensor
    odds: Tensor


def tokens_of(item: Scene) -> list[int]:
    """Per object, the number of the token at which its colour and shape stand in the caption, or -1; 0 is the start."""
    words = item.caption.replace(",", " ,").split()
    pairs = list(itertools.pairwise(words))
    return [pairs.index((o.color, o.shape)) + 1 if (o.color, o.shape) in pairs else -1 for o in item.objects]


def make_focus(count: int, path: Path, profile: str = "basic", side: int = 16) -> Focus:
    """Of the first ``count`` training scenes; kept in one file."""
    if path.exists():
        # A cache that the build wrote itself; but a workdir may be anybody's, so nothing but tensors is unpickled.
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


class Watched:
    """Attention written out, whose mean over heads (B, pixels, tokens) is added to ``kept``."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

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
        self.kept.append(weights.unflatten(0, (-1, attn.heads)).mean(1))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(weights @ value)))


def watch(unet: nn.Module) -> list[Tensor]:
    """Return a list that each cross-attention adds its weights to, in every pass; the reader clears it."""
    kept: list[Tensor] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Watched(kept))
    return kept


def focus_loss(kept: list[Tensor], masks: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, share): -log of the attention that goes from objects to their own words, and of what does not go to any
    object's words from elsewhere; and the share that the former has now. Means over places, then samples, then layers.

    masks (B, 3, H, W) in [0, 1]; tokens (B, 3) as in :class:`Focus`; weight (B,) of each sample."""
    there = (tokens >= 0)[..., None]  # (B, 3, 1)
    loss, share = torch.zeros(()), torch.zeros(())
    for attention in kept:
        side = int(attention.shape[1] ** 0.5)
        first = tokens.clamp(min=0)[:, None].expand(-1, attention.shape[1], -1)  # (B, P, 3)
        own = (attention.gather(2, first) + attention.gather(2, first + 1)).transpose(1, 2) * there  # (B, 3, P)
        inside = F.adaptive_avg_pool2d(masks, side).flatten(2) * there  # (B, 3, P)
        outside = (1 - inside.sum(1)).clamp(min=0)  # (B, P)
        to_own = _mean(-own.clamp(min=LEAST).log(), inside)
        astray = _mean(-(1 - own.sum(1)).clamp(min=LEAST).log()[:, None], outside[:, None])
        loss = loss + ((to_own + astray) * weight).mean() / len(kept)
        share = share + (_mean(own, inside) * weight).sum() / weight.sum().clamp(min=LEAST) / len(kept)
    return loss, share.detach()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """(B,) of (B, N, P)."""
    return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-3)
