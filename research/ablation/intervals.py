"""Intervals over trainings (seeds) and scenes at once."""

from __future__ import annotations

import numpy as np

from localctl.metrics.bootstrap import Interval
from localctl.seeding import numpy_rng

RESAMPLES = 2000


class Resampler:
    """Draws scenes, and seeds of training, with replacement, the same scenes for every table: so figures of several
    tables can be combined draw by draw.

    With few seeds the interval is narrower than it should be (three have only ten different draws): print the values of
    the seeds beside it.
    """

    def __init__(self, scenes: int, resamples: int = RESAMPLES) -> None:
        self.resamples = resamples
        drawn = numpy_rng(0, "scenes", scenes).multinomial(scenes, np.full(scenes, 1 / scenes), resamples)
        self._scenes = np.vstack([np.ones(scenes), drawn])  # (R+1, n); the first row is all scenes, once

    def means(self, table: np.ndarray) -> np.ndarray:
        """Of ``table`` (S, n), seeds by scenes, NaN = undefined and left out: (R+1,), the first is the plain mean. NaN
        where nothing is defined."""
        seeds, scenes = table.shape
        assert scenes == self._scenes.shape[1]
        drawn = numpy_rng(0, "seeds", seeds).multinomial(seeds, np.full(seeds, 1 / seeds), self.resamples)
        weights = np.vstack([np.ones(seeds), drawn])  # (R+1, S)
        known = ~np.isnan(table)
        total = np.einsum("rs,sn,rn->r", weights, np.where(known, table, 0), self._scenes, optimize=True)
        count = np.einsum("rs,sn,rn->r", weights, known.astype(float), self._scenes, optimize=True)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def interval(draws: np.ndarray, n: int) -> Interval | None:
    """95 % of what :meth:`Resampler.means`, or any function of it, gave; None where it is undefined."""
    if np.isnan(draws[0]):
        return None
    low, high = np.nanquantile(draws[1:], [0.025, 0.975])
    return Interval(float(draws[0]), float(low), float(high), n)
