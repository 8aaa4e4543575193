"""Regions on a denoiser's latent grids: how far each cell is covered, and which region counts where they overlap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localctl.masks import MASK_RESIZE

OVERLAPS = ("share", "first", "last", "smallest", "error")
CELL_MODES = (*MASK_RESIZE, "centre", "floor")


def resolve_overlap(coverage: Tensor, overlap: str) -> Tensor:
    """Return ``coverage`` (n, h, w) in [0, 1] without the parts hidden by other regions.

    ``overlap``: one of ``OVERLAPS``, the policy of a layout.
    """
    if overlap in ("share", "error"):
        return coverage
    order = list(range(len(coverage)))  # the topmost first
    if overlap == "last":
        order.reverse()
    elif overlap == "smallest":
        order.sort(key=lambda index: float(coverage[index].sum()))
    visible, free = torch.zeros_like(coverage), torch.ones_like(coverage[0])
    for index in order:
        visible[index] = torch.minimum(coverage[index], free)
        free = free - visible[index]
    return visible


def side_coverage(first: float, last: float, count: int, mode: str) -> Tensor:
    """Return how far each of ``count`` equal cells of [0, 1] is inside [first, last]: (count,) in [0, 1].

    ``mode``: one of ``CELL_MODES``.
    """
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    share = (edges[1:].clamp(max=last) - edges[:-1].clamp(min=first)).clamp(min=0) * count
    if mode == "area":
        return share.clamp(max=1).float()
    if mode == "inside":
        return (share > 1 - 1e-6).float()
    if mode == "cover":
        return (share > 1e-6).float()
    if mode == "floor":  # both ends are rounded down to whole cells
        ends = [math.floor(end * count + 1e-9) for end in (first, last)]
        return torch.tensor([float(ends[0] <= cell < ends[1]) for cell in range(count)])
    point = edges[:-1] + (0.5 / count if mode == "centre" else 0.0)  # nearest: the cell's first corner
    return ((point >= first - 1e-9) & (point < last - 1e-9)).float()
