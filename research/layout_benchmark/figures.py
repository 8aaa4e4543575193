"""Compute the figures of the benchmark and their intervals from the results of single methods."""

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

GATES = {"guidance": 0.40, "bias": 0.20, "dense": 0.20}  # least gain in "right" over plain, with two regions
MOST_FRECHET = 1.5  # largest Fréchet distance, relative to plain


def is_plain(name: str) -> bool:
    """Return whether this names plain sampling, with any scheduler and guidance scale."""
    return name.partition(" ")[0] == NONE


def read_figures(folder: Path) -> Figures:
    """Return the figures of the results in ``folder``. Raises ValueError for damaged or incompatible results."""

    def way(asked: Mapping[str, Any]) -> Any:
        return sorted(asked["protocol"].items()), asked["base_sha256"]

    return Figures(read_results(folder, "the layout benchmark", ("samples", "counts", "distances"), way))


class Figures:
    """Means, differences and distances from ``results``.

    Intervals are bootstrapped over layouts, each with all its seeds; differences are paired.

    Raises:
        ValueError: plain sampling was not measured, or not in each way that another method was generated.
    """

    def __init__(self, results: Mapping[str, Result]) -> None:
        if NONE not in results:
            raise ValueError("Plain sampling has no result, and all others are compared with it; measure it first.")
        self.results, self.plain = results, results[NONE]
        for name in results:
            self.plain_of(name)

    def plain_of(self, name: str) -> Result:
        """Return plain sampling with this method's scheduler and guidance scale. Raises ValueError if there is none."""
        way = self.results[name]["asked"].get("sampling")
        for result in self.results.values():
            if is_plain(result.name) and result["asked"].get("sampling") == way:
                return result
        raise ValueError(f"{name} was generated with {way}, and plain sampling was not; measure that, too.")

    def column(self, name: str, column: str, regions: int | None = None) -> np.ndarray:
        """Return the values (layouts, seeds) for layouts of so many regions; None: for all."""
        result = self.results[name]
        values = result.column(column).reshape(len(result.ids), -1)
        return values if regions is None else values[self.counts(name) == regions]

    def counts(self, name: str = NONE) -> np.ndarray:
        """Return the number of regions of each layout, (layouts,)."""
        return np.array(self.results[name]["counts"])

    def mean(self, name: str, column: str, regions: int | None = None) -> Interval | None:
        """Return the mean over the layouts for which the column is defined; None without any."""
        return interval(self.column(name, column, regions))

    def difference(self, name: str, column: str, regions: int | None = None) -> Interval | None:
        """Return the difference to plain sampling in the same way, paired by layout and seed."""
        to = self.plain_of(name).name
        return interval(self.column(name, column, regions) - self.column(to, column, regions))

    def frechet(self, name: str) -> float:
        """Return the Fréchet distance of the first extractor, relative to that of plain sampling in the same way."""
        key = next(key for key in self.plain["distances"] if key.startswith(("frechet_", "fid")))
        return self.results[name]["distances"][key] / self.plain_of(name)["distances"][key]

    @property
    def base(self) -> str:
        """The label of the base."""
        return str(self.plain["asked"].get("protocol", {}).get("base", "micro"))

    @property
    def several(self) -> list[str]:
        """Compositions of two methods, the best first."""
        names = [name for name in self.results if "+" in name]
        return sorted(names, key=lambda name: -_value(self.mean(name, "right", 2)))


@dataclass(frozen=True)
class Gate:
    """The goal of a method. gain: in the share of layouts of two regions that are right. frechet: relative to plain."""

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
    """Return the gates of the methods that were measured; they are for the embedded base alone."""
    return [
        Gate(name, wanted, figures.difference(name, "right", 2), figures.frechet(name))
        for name, wanted in GATES.items()
        if name in figures.results and figures.base == "micro"
    ]


RANKED = ("right", "accuracy", "color_right", "color_iou")


def ranked(figures: Figures) -> list[str]:
    """Return the methods of a tuning, the best first.

    Methods whose Fréchet distance passes the gate are first, each group sorted by the sum of the means in ``RANKED``
    for two regions: with few layouts, a single lucky image must not decide, as it might for ``right`` alone.
    """

    def score(name: str) -> tuple[float, ...]:
        return (
            float(figures.frechet(name) <= MOST_FRECHET),
            sum(_value(figures.mean(name, column, 2)) for column in RANKED),
        )

    return sorted(figures.results, key=score, reverse=True)


def _value(interval: Interval | None) -> float:
    return 0.0 if interval is None else interval.value
