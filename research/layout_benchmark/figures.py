"""Figures of the benchmark with their intervals, from the results of single methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localctl.cli.sample_regions import NONE
from localctl.evaluation.provenance import REQUIRED, check_provenance, read_json
from localctl.metrics.bootstrap import Interval, bootstrap
from research.reader import reader_version

GATES = {"guidance": 0.40, "bias": 0.20, "dense": 0.20}  # more of "right" than plain, with two regions
MOST_FRECHET = 1.5  # times plain's


@dataclass(frozen=True)
class Result:
    """A measured method. samples (layouts, seeds, k) over columns, NaN = undefined. counts (layouts,): regions."""

    name: str
    settings: tuple[tuple[str, str], ...]
    ids: tuple[str, ...]
    counts: np.ndarray
    columns: tuple[str, ...]
    samples: np.ndarray
    distances: Mapping[str, float]
    cost: Mapping[str, float | None]
    attention: Mapping[str, float]
    asked: Mapping[str, Any]
    provenance: Mapping[str, Any]


def is_plain(name: str) -> bool:
    """Whether this is plain sampling, in whatever way."""
    return name.partition(" ")[0] == NONE


def read_results(folder: Path) -> dict[str, Result]:
    """The results in ``folder`` by name. ValueError for a damaged one, or ways of measuring that differ."""
    results: dict[str, Result] = {}
    ways = set()
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, "result")
        missing = [key for key in ("asked", "name", "samples", "counts", "distances") if key not in content]
        if missing:
            raise ValueError(f"{path} is no result of the layout benchmark (no {missing[0]}); remove it.")
        check_provenance(content["name"], content, REQUIRED)
        results[content["name"]] = _result(content)
        asked = content["asked"]
        ways.add(repr((sorted(asked["protocol"].items()), asked["base_sha256"], reader_version(asked))))
    if len(ways) > 1:
        raise ValueError(f"The results in {folder} were measured in different ways; measure them again, in one.")
    return results


def _result(content: Mapping[str, Any]) -> Result:
    rows = [[np.nan if value is None else value for value in row] for row in content["samples"]]
    seeds = len(content["asked"]["protocol"]["seeds"])
    return Result(
        name=content["name"],
        settings=tuple((name, value) for name, value in content["settings"]),
        ids=tuple(content["ids"]),
        counts=np.array(content["counts"]),
        columns=tuple(content["columns"]),
        samples=np.array(rows, dtype=np.float64).reshape(len(content["ids"]), seeds, -1),
        distances=content["distances"],
        cost=content["cost"],
        attention=content["attention"],
        asked=content["asked"],
        provenance=content["provenance"],
    )


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
        way = self.results[name].asked.get("sampling")
        for result in self.results.values():
            if is_plain(result.name) and result.asked.get("sampling") == way:
                return result
        raise ValueError(f"{name} was drawn with {way}, and plain sampling was not; measure that, too.")

    def column(self, name: str, column: str, regions: int | None = None) -> np.ndarray:
        """(layouts, seeds) of those with so many regions; None: all."""
        result = self.results[name]
        chosen = slice(None) if regions is None else result.counts == regions
        return result.samples[chosen, :, result.columns.index(column)]

    def mean(self, name: str, column: str, regions: int | None = None) -> Interval | None:
        """Over the layouts where it is defined; None where it never is."""
        return _interval(self.column(name, column, regions))

    def difference(self, name: str, column: str, regions: int | None = None) -> Interval | None:
        """Less that of plain sampling in the same way, layout by layout and seed by seed."""
        to = self.plain_of(name).name
        return _interval(self.column(name, column, regions) - self.column(to, column, regions))

    def frechet(self, name: str) -> float:
        """Of the first extractor, over that of plain sampling in the same way."""
        key = next(key for key in self.plain.distances if key.startswith(("frechet_", "fid")))
        return self.results[name].distances[key] / self.plain_of(name).distances[key]

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
        gain = f"{self.gain.value:+.3f} [{self.gain.low:+.3f}, {self.gain.high:+.3f}]"
        return (
            f"{self.name}: {'met' if self.met else 'MISSED'}: {gain} of {self.wanted:+.2f} wanted, Fréchet distance "
            f"{self.frechet:.2f} times plain's (at most {MOST_FRECHET:g})"
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
    """Methods of a tuning, the best first: those that draw not much worse than plain, by the sum of what is right with
    two regions and its milder forms. Of few layouts, one picture that happens to be right decides nothing alone."""

    def score(name: str) -> tuple[float, ...]:
        return (
            float(figures.frechet(name) <= MOST_FRECHET),
            sum(_value(figures.mean(name, column, 2)) for column in RANKED),
        )

    return sorted(figures.results, key=score, reverse=True)


def _interval(table: np.ndarray) -> Interval | None:
    known = ~np.isnan(table)
    rows = known.any(axis=1)
    if not rows.any():
        return None
    sums = np.where(known, table, 0)[rows].sum(axis=1)
    return bootstrap(sums / known[rows].sum(axis=1))


def _value(interval: Interval | None) -> float:
    return 0.0 if interval is None else interval.value
