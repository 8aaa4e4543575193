"""Figures of the ablation with their intervals, from the results of single trainings."""

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
from research.ablation.rows import FLOOR, METHOD, ROWS, SWEEP, WITHOUT
from research.harness import Result, as_table, read_results

CONTROL = "control"  # (F1 - F1 of the base) / (F1 of the ceiling - F1 of the base)
RESAMPLES = 2000


class Resampler:
    """Resamples scenes, and seeds of training, the same scenes for every table: so figures of several tables can be
    combined sample by sample.

    With few seeds the interval is narrower than it should be (three have only ten different samples): print the values
    of the seeds beside it.
    """

    def __init__(self, scenes: int, resamples: int = RESAMPLES) -> None:
        self.resamples = resamples
        counts = numpy_rng(0, "scenes", scenes).multinomial(scenes, np.full(scenes, 1 / scenes), resamples)
        self._scenes = np.vstack([np.ones(scenes), counts])  # (R+1, n); the first row is all scenes, once

    def means(self, table: np.ndarray) -> np.ndarray:
        """Of ``table`` (S, n), seeds by scenes, NaN = undefined and left out: (R+1,), the first is the plain mean. NaN
        where nothing is defined."""
        seeds, scenes = table.shape
        assert scenes == self._scenes.shape[1]
        counts = numpy_rng(0, "seeds", seeds).multinomial(seeds, np.full(seeds, 1 / seeds), self.resamples)
        weights = np.vstack([np.ones(seeds), counts])  # (R+1, S)
        known = ~np.isnan(table)
        total = np.einsum("rs,sn,rn->r", weights, np.where(known, table, 0), self._scenes, optimize=True)
        count = np.einsum("rs,sn,rn->r", weights, known.astype(float), self._scenes, optimize=True)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def interval(samples: np.ndarray, n: int) -> Interval | None:
    """95 % of what :meth:`Resampler.means`, or any function of it, gave; None where it is undefined."""
    if np.isnan(samples[0]):
        return None
    low, high = np.nanquantile(samples[1:], [0.025, 0.975])
    return Interval(float(samples[0]), float(low), float(high), n)


def read_figures(folder: Path) -> Figures:
    """Of the results in ``folder``. ValueError for a damaged one, or results that do not go together."""

    def way(asked: Mapping[str, Any]) -> Any:
        return sorted(asked.get("protocol", {}).items())

    return Figures(read_results(folder, "the ablation", ("row", "title", "seed", "provenance"), way))


class Figures:
    """What follows from ``results``, of which the base's must be one (ValueError otherwise)."""

    def __init__(self, results: Mapping[str, Result]) -> None:
        if FLOOR not in results or results[FLOOR]["ceiling"] is None:
            raise ValueError("There is no result of the base yet, against which all others are read; measure it first.")
        self.base = results[FLOOR]
        for result in results.values():
            if not result["failed"] and (result.ids, result.columns) != (self.base.ids, self.base.columns):
                raise ValueError(f"The result {result.name} is not of the base's images and figures; remove it.")
        found: dict[str, list[Result]] = {name: [] for name in ROWS}
        for result in sorted(results.values(), key=lambda r: r["seed"]):
            if result["row"] in found and not result["failed"]:
                found[result["row"]].append(result)
        self.rows = {name: trained for name, trained in found.items() if trained}
        self.sweep = [r for r in results.values() if r["row"] == SWEEP]
        self.failed = [r for r in results.values() if r["failed"]]
        self.resampler = Resampler(len(self.base.ids))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.base.columns

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """(S, n, k) by row: seeds, scenes, columns; the ceiling and every setting of the sweep among them."""
        tables = {FLOOR: self.base.samples[None], CEILING: as_table(self.base["ceiling"])[None]}
        tables |= {name: np.stack([r.samples for r in trained]) for name, trained in self.rows.items()}
        return tables | {r.name: r.samples[None] for r in self.sweep if not r["failed"]}

    def mean(self, row: str, column: str) -> Interval | None:
        """Over seeds and scenes; ``control`` is a column, too."""
        n = self._tables[row].shape[1]
        if column != CONTROL:
            return interval(self._means(row, column), n)
        floor, top, reached = (self._means(name, "f1") for name in (FLOOR, CEILING, row))
        span = np.where(top > floor, top - floor, np.nan)
        return interval((reached - floor) / span, n)

    def undefined(self, row: str, column: str) -> int:
        """Images, over all seeds, of which ``column`` says nothing."""
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
                table[[r["seed"] in seeds for r in self.rows[name]]] for name, table in ((row, first), (other, second))
            )
        return interval(self.resampler.means(first - second), first.shape[1])

    def common_seeds(self, row: str, other: str) -> list[int]:
        return sorted(set.intersection(*({r["seed"] for r in self.rows.get(name, ())} for name in (row, other))))

    def per_seed(self, row: str, column: str) -> list[tuple[int, float]]:
        """(seed, mean over the scenes) of each training; ``column`` may be a distance."""
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
        """Mean over the trainings, of whole sets: there is no interval over scenes."""
        trained = [self.base] if row == FLOOR else self.rows.get(row) or [r for r in self.sweep if r.name == row]
        return float(np.mean([r["distances"][name] for r in trained]))

    def headline(self, column: str = "f1") -> Interval | None:
        """Return the method less the same without its local term; None until both have a training of one seed."""
        if METHOD not in self.rows or WITHOUT not in self.rows:
            return None
        return self.difference(METHOD, WITHOUT, column)

    def _means(self, row: str, column: str) -> np.ndarray:
        return self.resampler.means(self._column(row, column))

    def _column(self, row: str, column: str) -> np.ndarray:
        return self._tables[row][:, :, self.columns.index(column)]
