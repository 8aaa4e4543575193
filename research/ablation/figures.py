"""Compute the figures of the ablation and their intervals from the results of single trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from localctl.evaluation.compare import CEILING
from localctl.metrics.bootstrap import Interval
from localctl.seeding import numpy_rng
from research.ablation.rows import FLOOR, GUIDANCE, ROWS, SWEEP
from research.harness import Result, as_table, read_results

CONTROL = "control"  # (F1 - F1 of the base) / (F1 of the ceiling - F1 of the base)
RESAMPLES = 2000


class Resampler:
    """Bootstrap over scenes and training seeds.

    Every table is resampled with the same scenes, so that figures of several tables can be combined sample by sample.
    With few seeds the interval is too narrow (three have only ten different samples): print the value of each seed
    beside it.
    """

    def __init__(self, scenes: int, resamples: int = RESAMPLES) -> None:
        self.resamples = resamples
        counts = numpy_rng(0, "scenes", scenes).multinomial(scenes, np.full(scenes, 1 / scenes), resamples)
        self._scenes = np.vstack([np.ones(scenes), counts])  # (R+1, n); the first row has every scene once

    def means(self, table: np.ndarray) -> np.ndarray:
        """Return the means (R+1,) of ``table`` (S, n), seeds by scenes: first the plain one, then those resampled.

        NaN in ``table`` is left out; a mean of nothing is NaN.
        """
        seeds, scenes = table.shape
        assert scenes == self._scenes.shape[1]
        counts = numpy_rng(0, "seeds", seeds).multinomial(seeds, np.full(seeds, 1 / seeds), self.resamples)
        weights = np.vstack([np.ones(seeds), counts])  # (R+1, S)
        known = ~np.isnan(table)
        total = np.einsum("rs,sn,rn->r", weights, np.where(known, table, 0), self._scenes, optimize=True)
        count = np.einsum("rs,sn,rn->r", weights, known.astype(float), self._scenes, optimize=True)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def interval(samples: np.ndarray, n: int) -> Interval | None:
    """Return the 95 % interval of ``samples`` (R+1,), from :meth:`Resampler.means`; None if the first is undefined."""
    if np.isnan(samples[0]):
        return None
    low, high = np.nanquantile(samples[1:], [0.025, 0.975])
    return Interval(float(samples[0]), float(low), float(high), n)


def read_figures(folder: Path) -> Figures:
    """Return the figures of the results in ``folder``. Raises ValueError for damaged or incompatible results."""

    def way(asked: Mapping[str, Any]) -> Any:
        return sorted(asked.get("protocol", {}).items())

    return Figures(read_results(folder, "the ablation", ("row", "title", "seed", "provenance"), way))


class Figures:
    """Means, differences and distances from ``results``.

    Raises:
        ValueError: the base has no result, or another result has other images or columns than the base's.
    """

    def __init__(self, results: Mapping[str, Result]) -> None:
        if FLOOR not in results or results[FLOOR]["ceiling"] is None:
            raise ValueError("The base has no result yet, and all others are compared with it; measure the base first.")
        self.base = results[FLOOR]
        for result in results.values():
            if not result["failed"] and (result.ids, result.columns) != (self.base.ids, self.base.columns):
                raise ValueError(f"The result {result.name} has other images or columns than the base's; remove it.")
        found: dict[str, list[Result]] = {name: [] for name in ROWS}
        for result in sorted(results.values(), key=lambda r: r["seed"]):
            if result["row"] in found and not result["failed"]:
                found[result["row"]].append(result)
        self.rows = {name: trained for name, trained in found.items() if trained}
        self.sweep = [r for r in results.values() if r["row"] == SWEEP]
        self.guidance = [r for r in results.values() if r["row"] == GUIDANCE]
        self.failed = [r for r in results.values() if r["failed"]]
        self.resampler = Resampler(len(self.base.ids))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.base.columns

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """The table (S, n, k) of each row: seeds, scenes, columns; also of the ceiling and of the sweep's settings."""
        tables = {FLOOR: self.base.samples[None], CEILING: as_table(self.base["ceiling"])[None]}
        tables |= {name: np.stack([r.samples for r in trained]) for name, trained in self.rows.items()}
        return tables | {r.name: r.samples[None] for r in (*self.sweep, *self.guidance) if not r["failed"]}

    def mean(self, row: str, column: str) -> Interval | None:
        """Return the mean over seeds and scenes of a column, or of ``control``."""
        n = self._tables[row].shape[1]
        if column != CONTROL:
            return interval(self._means(row, column), n)
        floor, top, reached = (self._means(name, "f1") for name in (FLOOR, CEILING, row))
        span = np.where(top > floor, top - floor, np.nan)
        return interval((reached - floor) / span, n)

    def undefined(self, row: str, column: str) -> int:
        """Return the number of images, over all seeds, for which ``column`` is undefined."""
        return 0 if column == CONTROL else int(np.isnan(self._column(row, column)).sum())

    def difference(self, row: str, other: str, column: str) -> Interval | None:
        """Return the mean of ``row`` - ``other``, paired by scene and, if both are rows of trainings, by seed.

        None if they share no seed, or no scene for which both are defined.
        """
        first, second = self._column(row, column), self._column(other, column)
        if row in self.rows and other in self.rows:
            seeds = self.common_seeds(row, other)
            if not seeds:
                return None
            first, second = (
                table[[r["seed"] in seeds for r in self.rows[name]]] for name, table in ((row, first), (other, second))
            )
        return interval(self.resampler.means(first - second), first.shape[1])

    def ratio(self, row: str, other: str, column: str) -> Interval | None:
        """Return the mean of ``row`` over that of ``other``, of the same scenes."""
        means, below = self._means(row, column), self._means(other, column)
        known = np.where(below > 0, below, np.nan)
        return interval(means / known, self._tables[row].shape[1])

    def common_seeds(self, row: str, other: str) -> list[int]:
        """Return the seeds that both rows were trained with."""
        return sorted(set.intersection(*({r["seed"] for r in self.rows.get(name, ())} for name in (row, other))))

    def per_seed(self, row: str, column: str) -> list[tuple[int, float]]:
        """Return (seed, mean over the scenes) of each training; ``column`` may be a distance."""
        values = []
        for result in self.rows[row]:
            if column in result["distances"]:
                value = result["distances"][column]
            else:
                samples = result.column(column)
                value = np.nanmean(samples) if (~np.isnan(samples)).any() else math.nan
            values.append((result["seed"], float(value)))
        return values

    def distance(self, row: str, name: str) -> float:
        """Return the mean distance over the trainings; it is of whole sets, so it has no interval over scenes."""
        trained = (
            [self.base]
            if row == FLOOR
            else self.rows.get(row) or [r for r in (*self.sweep, *self.guidance) if r.name == row]
        )
        return float(np.mean([r["distances"][name] for r in trained]))

    def _means(self, row: str, column: str) -> np.ndarray:
        return self.resampler.means(self._column(row, column))

    def _column(self, row: str, column: str) -> np.ndarray:
        return self._tables[row][:, :, self.columns.index(column)]
