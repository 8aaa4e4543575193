"""Place one object, given its density and the boxes placed before: at the most likely place, or a sampled one.

Boxes never overlap. Two boxes that would overlap are shrunk about their centres, along the axis that needs the smaller
change. The score of a place is its log-likelihood, blurred by 8 % of the image's side, plus 3 log(factor by which boxes
shrink): an object with a wide density moves to a free place, one with a narrow density stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localctl.seeding import generator

_GRID = 48  # candidate centres per side
_SAMPLES = 64
_SMALLEST, _LARGEST = 0.04, 0.96  # sides of a box
_BLUR = 0.08  # of the image's side: prefers places with much probability mass around them to narrow peaks
_WORTH = 3.0  # cost in nats of a box that is shrunk to 1/e
_LEAST_ROOM, _THINNEST, _NEVER = 0.2, 0.03, 1e6  # places that need more shrinking are the last choice
_AIM, _CONTACT, _CLOSE, _IN_LINE = 0.12, 0.04, 0.15, 0.12  # widths of preferences, shares of the image's side
_MOVED = 20.0  # cost in nats of a sample that had to be moved
_APART = 1 - 1e-5  # so that adjacent boxes do not share a pixel after rounding


@dataclass(frozen=True)
class PlaceDensity:
    """Densities of the centre and size of each object; leading dimensions are (B, N).

    log_weights: (..., K). means: (..., K, 2), xy in units of the image's sides. sigmas: (..., K, 2).
    log_size, log_size_sigma: (..., 2), natural logarithm of width and height, in units of the image's sides.
    """

    log_weights: Tensor
    means: Tensor
    sigmas: Tensor
    log_size: Tensor
    log_size_sigma: Tensor

    def centre_log_prob(self, centres: Tensor) -> Tensor:
        """Return log p of centres (..., 2): shape (...)."""
        parts = _normal_log_prob(centres[..., None, :], self.means, self.sigmas).sum(dim=-1)  # (...,K)
        return torch.logsumexp(self.log_weights + parts, dim=-1)

    def size_log_prob(self, sizes: Tensor) -> Tensor:
        """Return log p of the logarithm of sizes (..., 2), width and height: shape (...)."""
        return _normal_log_prob(sizes.clamp(min=1e-4).log(), self.log_size, self.log_size_sigma).sum(dim=-1)

    def of(self, row: int, index: int | slice = slice(None)) -> PlaceDensity:
        """Return the density of one object, or of all objects of a prompt, on the CPU."""
        return PlaceDensity(*(getattr(self, name)[row, index].cpu() for name in self.__dataclass_fields__))


def _normal_log_prob(value: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    return -0.5 * ((value - mean) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Placement:
    """A box inside the image: centre and size in [0, 1], as fractions of the image's sides."""

    x: float
    y: float
    width: float
    height: float

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """(x, y, width, height)."""
        return self.x, self.y, self.width, self.height

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """The box as xyxy in [0, 1]."""
        half = self.width / 2, self.height / 2
        left, top = max(0.0, self.x - half[0]), max(0.0, self.y - half[1])
        return left, top, min(1.0, self.x + half[0]), min(1.0, self.y + half[1])


@dataclass(frozen=True)
class Link:
    """A box that the new one has a stated ``side`` of; ``touching``: as "on" and "atop" say."""

    box: Placement
    side: str
    touching: bool = False


Aim = tuple[float | None, float | None]  # a centre that the prompt asks for, per axis


@dataclass(frozen=True)
class Frame:
    """What is left for a box: its sides (2,), bounds of its centre (2,), and what is preferred within them."""

    sides: Tensor
    low: Tensor
    high: Tensor
    links: Sequence[Link] = ()
    aim: Aim = (None, None)

    @classmethod
    def of(cls, log_size: Tensor) -> Frame:
        """Return the frame of a box that may be anywhere inside the image."""
        sides = log_size.exp().clamp(_SMALLEST, _LARGEST)
        return cls(sides, sides / 2, 1 - sides / 2)

    def preference(self, centres: Tensor) -> Tensor:
        """Return the preference (n,) in nats for ``centres`` (n, 2): near what the box is related to, and in line."""
        total = torch.zeros(len(centres))
        for axis, wanted in enumerate(self.aim):
            if wanted is not None:
                total = total - 0.5 * ((centres[:, axis] - wanted) / _AIM) ** 2
        for link in self.links:
            other = torch.tensor([link.box.x, link.box.y])
            reach = (self.sides + torch.tensor([link.box.width, link.box.height])) / 2
            gap = (centres - other).abs() - reach
            floor = (
                centres[:, 1] - other[1] + (self.sides[1] - link.box.height) / 2
            )  # how far it stands below the other
            if link.side in ("above", "below"):
                total = total - 0.5 * (gap[:, 1] / (_CONTACT if link.touching else _CLOSE)) ** 2
                total = total - 0.5 * ((centres[:, 0] - other[0]) / _IN_LINE) ** 2
            else:
                total = total - 0.5 * (gap[:, 0].clamp(min=0) / _CLOSE) ** 2 - 0.5 * (floor / _IN_LINE) ** 2
        return total


def place(
    density: PlaceDensity,
    taken: Sequence[Placement],
    keys: tuple[int, str, int, int] | None,
    frame: Frame | None = None,
) -> tuple[Placement, list[Placement]]:
    """Return a box for one object inside the image, and the boxes of ``taken``, some of them shrunk to avoid overlap.

    Args:
        density: of one object, without leading dimensions.
        taken: boxes placed before.
        keys: None = the most likely place among the means of the mixture and a grid. (seed, prompt, object, copy) = one
            of 64 samples, of those that are free and within the frame if there are any.
        frame: size and bounds of the box; None: the size that the density has, anywhere inside the image.
    """
    frame = Frame.of(density.log_size) if frame is None else frame
    sides = frame.sides
    if keys is None:
        ticks = (torch.arange(_GRID) + 0.5) / _GRID
        centres = torch.cat([density.means, torch.cartesian_prod(ticks, ticks)])  # (n,2)
    else:
        random = generator(keys[0], "layout", *keys[1:])
        centres = _sample(density, random)
    # Move boxes that would extend over the edge of the image or break a relation.
    inside = torch.maximum(torch.minimum(centres, frame.high), frame.low)
    room = _room(inside, sides, taken)
    thinnest = min([float(sides.min()), *(min(other.width, other.height) for other in taken)])
    tight = room < max(_LEAST_ROOM, _THINNEST / thinnest)
    score = _WORTH * room.log() - _NEVER * tight + frame.preference(inside)
    if keys is None:
        score = score + density_at(density, inside, _BLUR)
    else:  # the samples have the density; one is chosen by what else is preferred
        moved = ~((room >= 1) & (inside == centres).all(dim=-1))
        noise = -(-torch.rand(len(centres), generator=random).clamp(1e-9).log()).log()
        score = score + noise - _MOVED * moved
    index = int(score.argmax())
    box = Placement(*inside[index].tolist(), *sides.tolist())
    return _shrink_apart(box, taken)


def _room(centres: Tensor, sides: Tensor, taken: Sequence[Placement]) -> Tensor:
    """Return factors (n,) in [0, 1] by which a box at each of ``centres`` (n, 2) and those it overlaps must shrink."""
    room = torch.ones(len(centres))
    for other in taken:
        reach = (sides + torch.tensor([other.width, other.height])) / 2
        away = (centres - torch.tensor([other.x, other.y])).abs()
        room = room * (away / reach).amax(dim=-1).clamp(max=1)
    return room


def _shrink_apart(box: Placement, taken: Sequence[Placement]) -> tuple[Placement, list[Placement]]:
    """Shrink ``box`` and those it overlaps, each pair along the axis on which their relative distance is larger."""
    others = list(taken)
    for index, other in enumerate(others):
        wide = abs(box.x - other.x) / ((box.width + other.width) / 2)
        high = abs(box.y - other.y) / ((box.height + other.height) / 2)
        factor = max(wide, high)
        if factor >= 1:
            continue
        factor *= _APART
        if wide >= high:
            box, other = (replace(item, width=item.width * factor) for item in (box, other))
        else:
            box, other = (replace(item, height=item.height * factor) for item in (box, other))
        others[index] = other
    return box, others


def density_at(density: PlaceDensity, centres: Tensor, blur: float = 0.0) -> Tensor:
    """Return log p (n,) up to a constant of centres (n, 2) of one object, the density blurred with sigma ``blur``."""
    sigmas = (density.sigmas**2 + blur**2).sqrt()
    parts = -0.5 * ((centres[:, None] - density.means) / sigmas) ** 2 - sigmas.log()  # (n,K,2)
    return torch.logsumexp(density.log_weights + parts.sum(dim=-1), dim=-1)


def _sample(density: PlaceDensity, random: torch.Generator) -> Tensor:
    """Sample centres (64, 2) from the mixture."""
    component = torch.multinomial(density.log_weights.exp(), _SAMPLES, replacement=True, generator=random)
    noise = torch.randn(_SAMPLES, 2, generator=random)
    return density.means[component] + density.sigmas[component] * noise
