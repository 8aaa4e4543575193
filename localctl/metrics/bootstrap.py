"""Percentile bootstrap intervals over samples (scenes), with a generator of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

_AT_ONCE = 1_000_000  # numbers


@dataclass(frozen=True)
class Interval:
    """A statistic and its percentile interval; `n` samples were resampled."""

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
    """Estimate the interval of `statistic(samples[rows])` (default: the mean) over resampled rows.

    Args:
        samples: (n,) or (n, k). Columns of one row belong together, so a statistic of several columns is paired.

    Raises:
        ValueError: no samples, or NaN among them (decide what undefined means before).
    """
    samples = np.asarray(samples, np.float64)
    count = len(samples)
    if not count:
        raise ValueError("There are no samples to take an interval of; evaluate at least one.")
    if np.isnan(samples).any():
        raise ValueError(f"{int(np.isnan(samples).any(axis=-1).sum())} samples are NaN; count and drop them first.")
    measure = statistic or (lambda rows: float(rows.mean()))
    value = measure(samples)
    if count == 1:  # the only resample there is
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
    # scipy's own limits differ from these in the last bit, and figures are compared with stored ones
    low, high = np.quantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), count)
