"""Figures of the ablation with their intervals, from the results of single trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from localctl.evaluation.compare import CEILING
from localctl.metrics.bootstrap import Interval
from research.ablation.intervals import Resampler, interval
from research.ablation.results import Result
from research.ablation.rows import FLOOR, METHOD, ROWS, SWEEP, WITHOUT

CONTROL = "control"  # (F1 - F1 of the base) / (F1 of the ceiling - F1 of the base)


class Figures:
    """What follows from ``results``, of which the base's must be one (ValueError otherwise)."""

    def __init__(self, results: Mapping[str, Result]) -> None:
        if FLOOR not in results or results[FLOOR].ceiling is None:
            raise ValueError("There is no result of the base yet, against which all others are read; measure it first.")
        self.base = results[FLOOR]
        for result in results.values():
            if not result.failed and (result.ids, result.columns) != (self.base.ids, self.base.columns):
                raise ValueError(f"The result {result.name} is not of the base's pictures and figures; remove it.")
        found: dict[str, list[Result]] = {name: [] for name in ROWS}
        for result in sorted(results.values(), key=lambda r: r.seed):
            if result.row in found and not result.failed:
                found[result.row].append(result)
        self.rows = {name: trained for name, trained in found.items() if trained}
        self.sweep = [r for r in results.values() if r.row == SWEEP]
        self.failed = [r for r in results.values() if r.failed]
        self.resampler = Resampler(len(self.base.ids))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.base.columns

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """(S, n, k) by row: seeds, scenes, columns; the ceiling and every setting of the sweep among them."""
        assert self.base.ceiling is not None
        tables = {FLOOR: self.base.samples[None], CEILING: self.base.ceiling[None]}
        tables |= {name: np.stack([r.samples for r in trained]) for name, trained in self.rows.items()}
        return tables | {r.name: r.samples[None] for r in self.sweep if not r.failed}

    def mean(self, row: str, column: str) -> Interval | None:
        """Over seeds and scenes; ``control`` is a column, too."""
        n = self._tables[row].shape[1]
        if column != CONTROL:
            return interval(self._means(row, column), n)
        floor, top, reached = (self._means(name, "f1") for name in (FLOOR, CEILING, row))
        span = np.where(top > floor, top - floor, np.nan)
        return interval((reached - floor) / span, n)

    def undefined(self, row: str, column: str) -> int:
        """Pictures, over all seeds, of which ``column`` says nothing."""
        return 0 if column == CONTROL else int(np.isnan(self._column(row, column)).sum())

    def difference(self, row: str, other: str, column: str) -> Interval | None:
        """Mean of ``row`` less ``other``, paired by scene and, where both are rows, by seed. None where they share no
        seed or no defined scene."""
        first, second = self._column(row, column), self._column(other, column)
        if row in self.rows and other in self.rows:
            seeds = self.common_seeds(row, other)
            if not seeds:
                return None
            first, second = (
                table[[r.seed in seeds for r in self.rows[name]]] for name, table in ((row, first), (other, second))
            )
        return interval(self.resampler.means(first - second), first.shape[1])

    def common_seeds(self, row: str, other: str) -> list[int]:
        return sorted({r.seed for r in self.rows.get(row, ())} & {r.seed for r in self.rows.get(other, ())})

    def per_seed(self, row: str, column: str) -> list[tuple[int, float]]:
        """(seed, mean over the scenes) of each training; ``column`` may be a distance."""
        values = []
        for result in self.rows[row]:
            if column in result.distances:
                values.append((result.seed, float(result.distances[column])))
            else:
                samples = result.samples[:, self.columns.index(column)]
                values.append((result.seed, float(np.nanmean(samples)) if (~np.isnan(samples)).any() else math.nan))
        return values

    def distance(self, row: str, name: str) -> float:
        """Mean over the trainings, of whole sets: there is no interval over scenes."""
        trained = [self.base] if row == FLOOR else self.rows.get(row) or [r for r in self.sweep if r.name == row]
        return float(np.mean([r.distances[name] for r in trained]))

    def headline(self, column: str = "f1") -> Interval | None:
        """The method less the same without its local term; None until both have a training of one seed."""
        if METHOD not in self.rows or WITHOUT not in self.rows:
            return None
        return self.difference(METHOD, WITHOUT, column)

    def _means(self, row: str, column: str) -> np.ndarray:
        return self.resampler.means(self._column(row, column))

    def _column(self, row: str, column: str) -> np.ndarray:
        return self._tables[row][:, :, self.columns.index(column)]
