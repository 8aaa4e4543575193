"""The order of samples as a pure function of (seed, step): a resumed run has nothing to restore and nothing to skip.

The permutations of all epochs are concatenated to one endless stream. A batch is a slice of it and may cross the end of
an epoch, so there is no short last batch. With several processes, each takes its part of the same global batch.

With aspect-ratio buckets, every bucket has such a stream, and a global batch is a slice of one of them. So all
processes train at one size in a step, each sample comes once in every epoch of its bucket, and no batch is short.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

from localctl.data.buckets import Buckets
from localctl.seeding import key_seed, numpy_rng


class SampleRef(NamedTuple):
    """A sample in an epoch. size: (height, width) that it is brought to; None = the dataset's."""

    sample: int
    epoch: int
    size: tuple[int, int] | None = None


class Plan(Protocol):
    """An endless stream of samples."""

    def at(self, position: int) -> SampleRef:
        """Return sample number ``position`` of the stream."""


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


class BucketPlan:
    """The endless stream of samples in ``buckets``; each ``batch_size`` samples, the global batch, have one size.

    In ``e`` epochs, a bucket of n samples has given ``(e * n + offset) // batch_size`` batches, so that it is never
    more than a batch away from its share; ``offset`` below the batch size is sampled, so that small buckets do not all
    wait. The batches of an epoch come in random order. A bucket with fewer samples than a batch repeats them in it.
    """

    def __init__(self, buckets: Buckets, seed: int, batch_size: int) -> None:
        self.buckets, self.seed, self.batch_size = buckets, seed, batch_size
        self._members = [buckets.members(bucket) for bucket in range(len(buckets.sizes))]
        self._counts = np.array([len(members) for members in self._members])
        if not self._counts.any():
            raise ValueError("No bucket has a sample; training needs at least one.")
        self._offsets = np.array([key_seed(seed, "bucket", *size) % batch_size for size in buckets.sizes])
        self._offsets[self._counts == 0] = 0
        self._order = lru_cache(maxsize=2 * len(buckets.sizes))(self._permutation)
        self._batches = lru_cache(maxsize=2)(self._batches_of)

    def at(self, position: int) -> SampleRef:
        """Return sample number ``position`` of the stream."""
        batch, place = divmod(position, self.batch_size)
        epoch = self._epoch_of(batch)
        bucket, number = self._batches(epoch)[batch - int(self._given(epoch).sum())].tolist()
        count = int(self._counts[bucket])
        turn, place = divmod(number * self.batch_size + place, count)
        sample = self._members[bucket][self._order(bucket, turn)[place]]
        return SampleRef(int(sample), turn, self.buckets.sizes[bucket])

    def _given(self, epochs: int) -> np.ndarray:
        """Return how many batches each bucket gives in the first ``epochs`` epochs."""
        return (epochs * self._counts + self._offsets) // self.batch_size

    def _epoch_of(self, batch: int) -> int:
        """Return the epoch of a global batch."""
        epoch = batch * self.batch_size // int(self._counts.sum())
        while self._given(epoch).sum() > batch:
            epoch -= 1
        while self._given(epoch + 1).sum() <= batch:
            epoch += 1
        return epoch

    def _batches_of(self, epoch: int) -> np.ndarray:
        """Return bucket, and number in the bucket's stream, of each batch of an epoch, (n,2)."""
        first, last = self._given(epoch), self._given(epoch + 1)
        bucket = np.repeat(np.arange(len(first)), last - first)
        number = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        batches = np.stack([bucket, number], axis=1)
        return batches[self._shuffled(batches[:, 0], epoch)]

    def _shuffled(self, buckets: np.ndarray, epoch: int) -> np.ndarray:
        """Return a random order of the batches of an epoch in which those of one bucket keep theirs."""
        mixed = numpy_rng(self.seed, "bucket order", epoch).permutation(buckets)
        order = np.empty(len(buckets), np.int64)
        order[np.argsort(mixed, kind="stable")] = np.arange(len(buckets))
        return order

    def _permutation(self, bucket: int, turn: int) -> np.ndarray:
        height, width = self.buckets.sizes[bucket]
        return numpy_rng(self.seed, "order", turn, height, width).permutation(int(self._counts[bucket]))


class PlanSampler(Sampler[list[SampleRef]]):
    """The micro-batches of steps ``start`` (included) to ``stop`` for one process, ``accumulation`` per step."""

    def __init__(
        self,
        plan: Plan,
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
