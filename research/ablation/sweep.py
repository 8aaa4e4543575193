"""The page's section on the sweep over weight, schedule and normalisation of the local term."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from localctl.evaluation.plots import curves
from localctl.metrics.bootstrap import Interval
from research.ablation.figures import CONTROL, Figures
from research.ablation.rows import WITHOUT
from research.page import figure, signed, table

NONE = "sweep_none"
ERRORS = 2.0  # by how many standard errors a KID may exceed that without the local term


@dataclass(frozen=True)
class Point:
    """One setting of the local term. name: of its result. curve: schedule and normalisation, as plots name them."""

    name: str
    curve: str
    weight: float


def points_of(figures: Figures) -> list[Point]:
    """Return the measured settings of the sweep, sorted by curve and weight."""
    found = []
    for result in figures.sweep:
        if result.name != NONE and not result["failed"]:
            loss = result["training"]["settings"]["loss"]
            found.append(Point(result.name, f"{loss['schedule']}, {loss['normalise']}", float(loss["weight"])))
    return sorted(found, key=lambda p: (p.curve, p.weight))


def loses(figures: Figures, name: str) -> list[str]:
    """Return the extractors under which the setting ``name`` is worse than no local term.

    Worse is a KID that is higher by more than ``ERRORS`` standard errors of the difference; the Fréchet distance has
    no standard error.
    """
    worse = []
    for key in figures.base["distances"]:
        if key.startswith("kid_") and not key.startswith("kid_error_"):
            extractor = key.removeprefix("kid_")
            more = figures.distance(name, key) - figures.distance(NONE, key)
            errors = [figures.distance(n, f"kid_error_{extractor}") for n in (name, NONE)]
            if more > ERRORS * math.hypot(*errors):
                worse.append(extractor)
    return worse


def best(figures: Figures) -> Point | None:
    """Return the setting with the highest F1 among those that are not worse under any extractor; None without one."""
    fair = [(f1.value, p) for p in points_of(figures) if not loses(figures, p.name) and (f1 := _f1(figures, p.name))]
    return max(fair, key=lambda pair: pair[0])[1] if fair else None


def sweep_section(figures: Figures, page: Path) -> list[str]:
    """Return the table, the verdict and the curves of the sweep.

    The section is empty without a measured setting, or without the training that lacks the local term.
    """
    points = points_of(figures)
    without = [r for r in figures.sweep if r.name == NONE and not r["failed"]]
    if not points or not without:
        return []
    frechet = [d for d in figures.base["distances"] if d.startswith(("frechet_", "fid"))]
    columns = ["weight", "F1 in the mask", CONTROL, *frechet, "worse than no local term"]
    rows = []
    for name, curve, weight in [(NONE, "no local term", 0.0), *((p.name, p.curve, p.weight) for p in points)]:
        worse = "" if name == NONE else ", ".join(loses(figures, name)) or "no"
        means = [str(figures.mean(name, "f1")), str(figures.mean(name, CONTROL))]
        rows.append((curve, [f"{weight:g}", *means, *(f"{figures.distance(name, d):.4g}" for d in frechet), worse]))
    return [
        "## Weight, schedule and normalisation",
        "",
        f"Sobel in the mask, {without[0]['asked']['steps']} steps each, one seed. Curves are named `schedule, "
        "normalisation`.",
        "",
        *table(columns, rows, "setting"),
        "",
        f"Worse: a KID more than {ERRORS:g} standard errors above that without the local term.",
        "",
        _verdict(figures),
        "",
        *_plots(figures, points, frechet, page),
        "",
    ]


def _verdict(figures: Figures) -> str:
    chosen = best(figures)
    if chosen is None:
        return "Every setting draws worse than no local term."
    difference = figures.difference(chosen.name, NONE, "f1")
    assert difference is not None
    covers = difference.low <= 0 <= difference.high
    return (
        f"The highest F1 among those that draw no worse is {chosen.curve}, weight {chosen.weight:g}: "
        f"{signed(difference)} against no local term{', no difference' if covers else ''}. It was chosen among "
        f"{len(points_of(figures))} on the same scenes, so its interval flatters it: train it with several seeds "
        f"before trusting it.{_seeds_apart(figures)}"
    )


def _seeds_apart(figures: Figures) -> str:
    """Return the sentence on how much another seed changes, if there are several."""
    values = [value for _, value in figures.per_seed(WITHOUT, "f1")] if WITHOUT in figures.rows else []
    if len(values) < 2:
        return ""
    return (
        f" Seeds alone move the F1 of `{WITHOUT}` by {max(values) - min(values):.3f} "
        f"({min(values):.3f} to {max(values):.3f})."
    )


def _plots(figures: Figures, points: list[Point], frechet: list[str], page: Path) -> list[str]:
    lines = []
    for column in ("f1", *frechet):
        series: dict[str, dict[float, Interval]] = {}
        for point in points:
            value = _f1(figures, point.name) if column == "f1" else _exact(figures.distance(point.name, column))
            if value is not None and point.weight > 0:
                series.setdefault(point.curve, {})[point.weight] = value
        level = _f1(figures, NONE) if column == "f1" else _exact(figures.distance(NONE, column))
        if series and level is not None:
            label = "F1 in the mask" if column == "f1" else f"{column} (lower is better)"
            image = curves(series, "weight", label, {"no local term": level.value})
            lines.append(figure(image, page, f"sweep_{column}", f"{label} over the weight"))
    return lines


def _f1(figures: Figures, name: str) -> Interval | None:
    return figures.mean(name, "f1")


def _exact(value: float) -> Interval:
    return Interval(value, value, value, 1)
