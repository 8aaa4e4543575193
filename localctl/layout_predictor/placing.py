"""Where to put one object, given its density and the boxes that are there: the most likely place that is free, or a
drawn one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from localctl.random import generator

if TYPE_CHECKING:
    from localctl.layout_predictor.model import PlaceDensity

_GRID = 48  # candidate centres per side
_DRAWS = 64
_SMALLEST, _LARGEST = 0.04, 0.8  # sides of a box; something else must have room, too
_SHRINK, _SHRINKS, _PATIENCE = 0.85, 18, 4
_NEAR = 1.0  # nats: a free place may be so much less likely than the best one before the box is made smaller


@dataclass(frozen=True)
class Placement:
    """A box inside the picture: centre and size in [0, 1]."""

    x: float
    y: float
    width: float
    height: float

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        return self.x, self.y, self.width, self.height

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """xyxy in [0, 1]."""
        half = self.width / 2, self.height / 2
        left, top = max(0.0, self.x - half[0]), max(0.0, self.y - half[1])
        return left, top, min(1.0, self.x + half[0]), min(1.0, self.y + half[1])


def place(density: PlaceDensity, taken: Sequence[Placement], keys: tuple[int, str, int, int] | None) -> Placement:
    """A box for one object that lies inside the picture and overlaps none of ``taken``.

    Args:
        density: of one object, without leading dimensions.
        keys: None for the most likely place, on a grid; else (seed, prompt, object, copy) of a draw: of 64 draws the
            first that is free, or the most likely place where none is.

    Where no place nearly as good as the best one is free, the box is made smaller, up to 4 times by 15 %, before a less
    likely place is taken; and further where none is free at all. ValueError when the picture is full.
    """
    size = density.log_size
    if keys is not None:
        draws = generator(keys[0], "layout", *keys[1:])
        size = size + density.log_size_sigma * torch.randn(2, generator=draws)
        centres = _draw(density, draws)
        width, height = size.exp().clamp(_SMALLEST, _LARGEST).tolist()
        free = _free(centres, width, height, taken).nonzero()
        if len(free):
            return Placement(*centres[int(free[0])].tolist(), width, height)
    width, height = size.exp().clamp(_SMALLEST, _LARGEST).tolist()
    return _most_likely(density, Placement(0.5, 0.5, width, height), taken)


def _most_likely(density: PlaceDensity, box: Placement, taken: Sequence[Placement]) -> Placement:
    ticks = (torch.arange(_GRID) + 0.5) / _GRID
    grid = torch.cartesian_prod(ticks, ticks)  # (n,2)
    found: Placement | None = None
    for turn in range(_SHRINKS + 1):
        # Inside the picture: what would stick out stands at its edge.
        half = torch.tensor([box.width / 2, box.height / 2])
        centres = torch.maximum(torch.minimum(torch.cat([density.means, grid]), 1 - half), half)
        chances = density_at(density, centres)
        best = float(chances.max())
        chances = chances.masked_fill(~_free(centres, box.width, box.height, taken), -torch.inf)
        index = int(chances.argmax())
        here = replace(box, x=float(centres[index, 0]), y=float(centres[index, 1]))
        if chances[index] >= best - _NEAR:
            return here
        if found is None and chances[index] > -torch.inf:
            found = here
        if found is not None and turn >= _PATIENCE:
            return found
        box = replace(box, width=box.width * _SHRINK, height=box.height * _SHRINK)
    if found is None:
        raise ValueError(f"There is no room for one more object beside {len(taken)}; name fewer.")
    return found


def density_at(density: PlaceDensity, centres: Tensor) -> Tensor:
    """log p of many centres (n, 2) of one object -> (n,)."""
    parts = -0.5 * ((centres[:, None] - density.means) / density.sigmas) ** 2 - density.sigmas.log()  # (n,K,2)
    return torch.logsumexp(density.log_weights + parts.sum(dim=-1), dim=-1)


def _draw(density: PlaceDensity, draws: torch.Generator) -> Tensor:
    """(64, 2) centres from the mixture."""
    component = torch.multinomial(density.log_weights.exp(), _DRAWS, replacement=True, generator=draws)
    noise = torch.randn(_DRAWS, 2, generator=draws)
    return density.means[component] + density.sigmas[component] * noise


def _free(centres: Tensor, width: float, height: float, taken: Sequence[Placement]) -> Tensor:
    """(n,) bool: whether a box of this size at each centre (n, 2) lies inside the picture and overlaps none."""
    half = torch.tensor([width / 2, height / 2])
    free = ((centres >= half - 1e-6) & (centres <= 1 - half + 1e-6)).all(dim=-1)
    for other in taken:
        reach = half + torch.tensor([other.width / 2, other.height / 2]) - 1e-6
        away = (centres - torch.tensor([other.x, other.y])).abs()
        free &= (away >= reach).any(dim=-1)
    return free
