"""Percentile bootstrap intervals over samples (scenes), with a generator of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


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
    """Interval of `statistic(samples[rows])` (default: the mean) over resampled rows.

    Args:
        samples: (n,) or (n, k). Columns of one row belong together, so a statistic of several columns is paired.

    Raises:
        ValueError: no samples, or NaN among them (decide what undefined means before).
    """
    samples = np.asarray(samples, np.float64)
    if not len(samples):
        raise ValueError("There are no samples to take an interval of; evaluate at least one.")
    if np.isnan(samples).any():
        raise ValueError(f"{int(np.isnan(samples).any(axis=-1).sum())} samples are NaN; count and drop them first.")
    measure = statistic or (lambda rows: float(rows.mean()))
    rng = np.random.default_rng(seed)
    values: np.ndarray | list[float]
    if statistic is None and samples.ndim == 1:  # the same draws as below, at once
        values = samples[rng.integers(len(samples), size=(resamples, len(samples)))].mean(axis=1)
    else:
        values = [measure(samples[rng.integers(len(samples), size=len(samples))]) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(measure(samples), float(low), float(high), len(samples))
