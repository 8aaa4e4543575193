"""Figures of the benchmark with their intervals, from the results of single methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localctl.control.presets import NONE
from localctl.metrics.bootstrap import Interval
from research.harness import Result, read_results
from research.page import interval, signed

GATES = {"guidance": 0.40, "bias": 0.20, "dense": 0.20}  # more of "right" than plain, with two regions
MOST_FRECHET = 1.5  # times plain's


def is_plain(name: str) -> bool:
    """Whether this is plain sampling, in whatever way."""
    return name.partition(" ")[0] == NONE


def read_figures(folder: Path) -> Figures:
    """Of the results in ``folder``. ValueError for a damaged one, or results that do not go together."""

    def way(asked: Mapping[str, Any]) -> Any:
        return sorted(asked["protocol"].items()), asked["base_sha256"]

    return Figures(read_results(folder, "the layout benchmark", ("samples", "counts", "distances"), way))


class Figures:
    """What follows from ``results``, of which plain sampling must be one (ValueError otherwise).

    Intervals are over layouts, whose seeds belong together; differences are paired.
    """

    def __init__(self, results: Mapping[str, Result]) -> None:
        if NONE not in results:
            raise ValueError("There is no result of plain sampling, against which all others are read.")
        self.results, self.plain = results, results[NONE]
        for name in results:
            self.plain_of(name)

    def plain_of(self, name: str) -> Result:
        """Plain sampling with the scheduler and guidance scale of this method. ValueError if it was not measured."""
        way = self.results[name]["asked"].get("sampling")
        for result in self.results.values():
            if is_plain(result.name) and result["asked"].get("sampling") == way:
                return result
        raise ValueError(f"{name} was generated with {way}, and plain sampling was not; measure that, too.")

    def column(self, name: str, column: str, regions: int | None = None) -> np.ndarray:
        """(layouts, seeds) of those with so many regions; None: all."""
        result = self.results[name]
        values = result.column(column).reshape(len(result.ids), -1)
        return values if regions is None else values[self.counts(name) == regions]

    def counts(self, name: str = NONE) -> np.ndarray:
        """(layouts,): how many regions each has."""
        return np.array(self.results[name]["counts"])

    def mean(self, name: str, column: str, regions: int | None = None) -> Interval | None:
        """Over the layouts where it is defined; None where it never is."""
        return interval(self.column(name, column, regions))

    def difference(self, name: str, column: str, regions: int | None = None) -> Interval | None:
        """Less that of plain sampling in the same way, layout by layout and seed by seed."""
        to = self.plain_of(name).name
        return interval(self.column(name, column, regions) - self.column(to, column, regions))

    def frechet(self, name: str) -> float:
        """Of the first extractor, over that of plain sampling in the same way."""
        key = next(key for key in self.plain["distances"] if key.startswith(("frechet_", "fid")))
        return self.results[name]["distances"][key] / self.plain_of(name)["distances"][key]

    @property
    def several(self) -> list[str]:
        """Compositions, the best first."""
        names = [name for name in self.results if "+" in name]
        return sorted(names, key=lambda name: -_value(self.mean(name, "right", 2)))


@dataclass(frozen=True)
class Gate:
    """Whether a method reaches what is asked of it. gain: of the share of layouts that are right, with two regions."""

    name: str
    wanted: float
    gain: Interval | None
    frechet: float

    @property
    def met(self) -> bool:
        return self.gain is not None and self.gain.value >= self.wanted and self.frechet <= MOST_FRECHET

    def __str__(self) -> str:
        if self.gain is None:
            return f"{self.name}: no layout of two regions was measured"
        return (
            f"{self.name}: {'met' if self.met else 'MISSED'}: {signed(self.gain)} of {self.wanted:+.2f} wanted, "
            f"Fréchet distance {self.frechet:.2f} times plain's (at most {MOST_FRECHET:g})"
        )


def gates(figures: Figures) -> list[Gate]:
    """Those of the methods that were measured."""
    return [
        Gate(name, wanted, figures.difference(name, "right", 2), figures.frechet(name))
        for name, wanted in GATES.items()
        if name in figures.results
    ]


RANKED = ("right", "accuracy", "color_right", "color_iou")


def ranked(figures: Figures) -> list[str]:
    """Methods of a tuning, the best first: those whose images are not much worse than plain's, by the sum of what is
    right with two regions and its milder forms: of few layouts, one image that happens to be right decides nothing."""

    def score(name: str) -> tuple[float, ...]:
        return (
            float(figures.frechet(name) <= MOST_FRECHET),
            sum(_value(figures.mean(name, column, 2)) for column in RANKED),
        )

    return sorted(figures.results, key=score, reverse=True)


def _value(interval: Interval | None) -> float:
    return 0.0 if interval is None else interval.value
