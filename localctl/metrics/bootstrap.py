"""Percentile bootstrap intervals over samples, with a random generator of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

_AT_ONCE = 1_000_000  # values resampled at once


@dataclass(frozen=True)
class Interval:
    """A statistic of `n` samples and its percentile interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    samples: np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Estimate the percentile interval of a statistic over resampled rows.

    Args:
        samples: (n,) or (n, k). Rows are resampled as a whole, so a statistic of several columns is paired.
        statistic: a function of resampled rows; None: their mean.
        level: coverage of the interval.

    Raises:
        ValueError: there are no samples, or some are NaN (drop undefined samples first).
    """
    samples = np.asarray(samples, np.float64)
    count = len(samples)
    if not count:
        raise ValueError("There are no samples to compute an interval of; evaluate at least one.")
    if np.isnan(samples).any():
        raise ValueError(f"{int(np.isnan(samples).any(axis=-1).sum())} samples are NaN; count and drop them first.")
    measure = statistic or (lambda rows: float(rows.mean()))
    value = measure(samples)
    if count == 1:  # every resample is the same
        return Interval(value, value, value, 1)
    plain = statistic is None and samples.ndim == 1
    result = stats.bootstrap(
        (samples if plain else np.arange(count),),
        np.mean if plain else lambda rows: measure(samples[rows.astype(int)]),
        vectorized=plain,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // count),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    # scipy's limits differ from these in the last bit, and stored results have these
    low, high = np.quantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), count)
