"""The segments of dense modulation on a layer's grid: which cells, and which cells and tokens, belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RESTS = ("published", "segment", "free")


@dataclass(frozen=True)
class Classes:
    """The cells of one layout on a layer's grid, in classes that lie in the same segments; P classes, s segments.

    The last segment is the rest, the cells that no region covers. All tensors are float32 on the CPU.

    Args:
        of_cell: (Q,) int64, the class of each cell.
        member: (P, s) 0 or 1. strength: (s,), of the segments. covered: (P,), whether a region covers the class.
        size: (P,): 1 - size_regularisation * area_i. own: (P,): the strength of each class's own segments.
        rest: the treatment of the rest, one of ``RESTS``.
    """

    of_cell: Tensor
    member: Tensor
    strength: Tensor
    covered: Tensor
    size: Tensor
    own: Tensor
    rest: str

    @classmethod
    def of(cls, masks: Tensor, strengths: Sequence[float], rest: str, size_regularisation: float) -> Classes:
        """Return the classes of regions (r, Q) with these strengths."""
        member = torch.zeros(len(masks) + 1, masks.shape[1])
        strength = torch.tensor([*strengths, max(strengths, default=0.0)])
        if len(masks):
            member[:-1] = (masks >= 0.5 * masks.amax(dim=1, keepdim=True)).float()
        covered = member.amax(dim=0)  # (Q,)
        own = torch.where(covered > 0, (member * strength[:, None]).amax(dim=0), strength[-1])
        if rest == "segment":
            member[-1] = 1 - covered
        area = (member * member.mean(dim=1, keepdim=True)).sum(dim=0)  # (Q,)
        if rest == "free":
            # One more segment with strength 0, which leaves the scores among its cells unchanged.
            member[-1], strength[-1] = 1 - covered, 0
        patterns, of_cell = member.T.unique(dim=0, return_inverse=True)
        first = torch.zeros(len(patterns), dtype=torch.int64)
        first[of_cell] = torch.arange(len(of_cell))  # any cell of each class
        size = (1 - size_regularisation * area).clamp(min=0)
        return cls(of_cell, patterns, strength, covered[first] > 0, size[first], own[first], rest)

    @property
    def count(self) -> int:
        """The number P of classes."""
        return len(self.member)

    def cross(self, words: Tensor) -> Tensor:
        """Return lambda_i / (w (t/1000)^decay), (Q,K), negative where a cell and a token do not belong together.

        ``words`` (s,K): 1 where a token belongs to a segment's phrase.
        """
        weighted = words * self.strength[:, None]
        inside, outside = self.member @ weighted, (1 - self.member) @ weighted
        others = 1 - words.amax(dim=0)  # (K,): tokens of no phrase
        rest = {"published": -1.0, "segment": 1.0, "free": 0.0}[self.rest]
        free = torch.where(self.covered, -self.own, rest * self.own)
        return ((inside - outside + others * free[:, None]) * self.size[:, None])[self.of_cell]

    @cached_property
    def pairs(self) -> Tensor:
        """The same for pairs of classes, (P,P)."""
        shared = self.member[:, None] * self.member[None]  # (P,P,s)
        inside = (shared * self.strength).amax(dim=2)
        return torch.where(shared.amax(dim=2) > 0, inside, -self.own[:, None]) * self.size[:, None]

    @cached_property
    def portion(self) -> Tensor:
        """The amount of each class, (P,): that of all its pairs, if ``has_factors``, but of loose cells."""
        return self.own * self.size

    @cached_property
    def loose(self) -> Tensor:
        """Whether the scores among the cells of a class are left unchanged while others are lowered, (P,)."""
        return (self.pairs.diagonal() == 0) & (self.portion > 0)

    @cached_property
    def has_factors(self) -> bool:
        """Whether all scores of a query change by one amount: so unless regions of different strength overlap."""
        alike = self.pairs.abs() == self.portion[:, None]
        return bool((alike | torch.diag(self.loose)).all())

    def table(self, name: str, width: int) -> Tensor:
        """Return a tensor with a row for each cell: (Q,1), or (Q,width) with a column for each class.

        ``name``: ``portion`` or ``loose``; ``pairs``; ``member``: 1 for the own class; ``together``: 1 where scores
        rise; ``alone``: 1 for the own class of loose cells.
        """
        if name in ("portion", "loose"):
            return getattr(self, name).float()[self.of_cell, None]
        identity = torch.eye(len(self.member))
        columns = {
            "pairs": self.pairs,
            "member": identity,
            "together": (self.pairs > 0).float(),
            "alone": identity * self.loose,
        }[name]
        return torch.nn.functional.pad(columns, (0, width - len(columns)))[self.of_cell]
