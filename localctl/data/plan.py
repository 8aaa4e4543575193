"""The order of samples as a pure function of (seed, step): a resumed run has nothing to restore and nothing to skip.

The permutations of all epochs are concatenated to one endless stream. A batch is a slice of it and may cross the end of
an epoch, so there is no short last batch. With several processes, each takes its part of the same global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from localctl.seeding import numpy_rng


class SampleRef(NamedTuple):
    """A sample in an epoch."""

    sample: int
    epoch: int


class SamplePlan:
    """The endless stream of samples of a dataset of ``count``; ValueError if that is below 1."""

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("The dataset is empty; training needs at least one sample.")
        self.count = count
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._permutation)  # a batch rarely spans more than two epochs

    def _permutation(self, epoch: int) -> np.ndarray:
        return numpy_rng(self.seed, "order", epoch).permutation(self.count)

    def at(self, position: int) -> SampleRef:
        """Return sample number ``position`` of the stream."""
        epoch, place = divmod(position, self.count)
        return SampleRef(int(self._order(epoch)[place]), epoch)


class PlanSampler(Sampler[list[SampleRef]]):
    """The micro-batches of steps ``start`` (included) to ``stop`` for one process, ``accumulation`` per step."""

    def __init__(
        self,
        plan: SamplePlan,
        batch_size: int,
        start: int,
        stop: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.plan = plan
        self.batch_size = batch_size
        self.micro_steps = range(start * accumulation, stop * accumulation)
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.micro_steps)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for micro_step in self.micro_steps:
            first = (micro_step * self.world_size + self.rank) * self.batch_size
            yield [self.plan.at(first + i) for i in range(self.batch_size)]
