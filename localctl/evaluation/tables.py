"""Format a comparison as JSON, Markdown, LaTeX and a plot of bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from localctl.evaluation.compare import CEILING, LOWER_IS_BETTER, Comparison, verdict
from localctl.evaluation.plots import bars
from localctl.metrics.bootstrap import Interval


def as_json(comparison: Comparison, against: str) -> dict[str, Any]:
    """Format means with intervals, counts of undefined samples, paired differences to the set ``against``, the values
    of every sample (NaN as null), timing and provenance as plain JSON."""
    rows = {}
    for name, table in comparison.tables.items():
        figures = {}
        for column in comparison.columns:
            interval, difference = comparison.interval(name, column), comparison.difference(name, against, column)
            figures[column] = {
                "mean": None if interval is None else asdict(interval),
                "undefined": comparison.undefined(name, column),
                "difference": None if difference is None else asdict(difference) | {"verdict": verdict(difference)},
            }
        values = [[None if value != value else value for value in row] for row in table.tolist()]
        rows[name] = {"figures": figures, "samples": values}
    return {
        "columns": list(comparison.columns),
        "ids": list(comparison.ids),
        "floor": comparison.floor,
        "ceiling": CEILING,
        "against": against,
        "rows": rows,
        "timing": {
            "drawing": {name: asdict(speed) for name, speed in comparison.speeds.items()},
            "measuring_seconds": None if math.isnan(comparison.seconds) else comparison.seconds,
        },
        "provenance": dict(comparison.provenance),
    }


def markdown(comparison: Comparison, against: str, columns: Sequence[str] = ()) -> str:
    """Format two tables: means with 95 % intervals over samples, and paired differences to the set ``against``."""
    columns = columns or comparison.columns
    lines = head(["", *(_headed(column) for column in columns)])
    for name in comparison.tables:
        cells = [_mean(comparison, name, column) for column in columns]
        lines.append(line([_labelled(comparison, name), *cells]))
    n = len(comparison.ids)
    lines += ["", f"Means over {n} samples with 95 % bootstrap intervals; (-k): k samples undefined and left out.", ""]
    others = [name for name in comparison.tables if name not in (against, CEILING)]
    if others:
        lines += head([f"less {against!r}", *columns])
        lines += [line([name, *(_difference(comparison, name, against, c) for c in columns)]) for name in others]
        lines += ["", f"Paired differences to {against!r}: the same examples, masks and noise."]
    return "\n".join([*lines, *_timing(comparison)]) + "\n"


def _timing(comparison: Comparison) -> list[str]:
    lines = [f"- {name} was generated at {speed}." for name, speed in comparison.speeds.items()]
    if not math.isnan(comparison.seconds):
        images = len(comparison.tables) * len(comparison.ids)
        lines.append(f"- {images} images were measured in {comparison.seconds:.1f} s.")
    return ["", *lines] if lines else []


def latex(comparison: Comparison, columns: Sequence[str] = ()) -> str:
    """Format a tabular with booktabs rules: means with the half widths of their intervals, the best generated set of
    each column in bold."""
    columns = columns or comparison.columns
    made = [name for name in comparison.tables if name != CEILING]
    best = {}
    for column in columns:
        means = {name: i.value for name in made if (i := comparison.interval(name, column)) is not None}
        if means:
            best[column] = (min if column in LOWER_IS_BETTER else max)(means, key=lambda name: means[name])
    lines = [f"\\begin{{tabular}}{{l{'c' * len(columns)}}}", "\\toprule"]
    lines += [" & ".join(["", *(_escaped(column) for column in columns)]) + " \\\\", "\\midrule"]
    for name in comparison.tables:
        cells = [_latex_cell(comparison.interval(name, c), best.get(c) == name) for c in columns]
        lines.append(" & ".join([_escaped(name), *cells]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def plot(comparison: Comparison) -> Image.Image:
    """Plot one panel per metric: the mean of every row with its interval. ValueError where no metric is defined."""
    panels = {
        _headed(column): {_labelled(comparison, name): comparison.interval(name, column) for name in comparison.tables}
        for column in comparison.columns
    }
    return bars(panels)


_LATEX = str.maketrans(
    {sign: "\\" + sign for sign in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
)


def line(cells: Sequence[str]) -> str:
    """Format a row of a Markdown table; table markup and HTML in the cells are escaped."""
    plain = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return "| " + " | ".join(plain) + " |"


def head(cells: Sequence[str]) -> list[str]:
    """Format the first two lines of a Markdown table."""
    return [line(cells), line(["---"] * len(cells))]


def _headed(column: str) -> str:
    return f"{column} {'(lower is better)' if column in LOWER_IS_BETTER else ''}".strip()


def _labelled(comparison: Comparison, name: str) -> str:
    return {CEILING: f"{name} (ceiling)", comparison.floor: f"{name} (floor)"}.get(name, name)


def _mean(comparison: Comparison, name: str, column: str) -> str:
    interval, undefined = comparison.interval(name, column), comparison.undefined(name, column)
    return ("undefined" if interval is None else str(interval)) + (f" (-{undefined})" if undefined else "")


def _difference(comparison: Comparison, name: str, against: str, column: str) -> str:
    difference = comparison.difference(name, against, column)
    if difference is None:
        return "undefined"
    remark = " no difference" if verdict(difference) == "no difference" else ""
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{remark}"


def _latex_cell(interval: Interval | None, bold: bool) -> str:
    if interval is None:
        return "--"
    text = f"{interval.value:.3f} \\pm {(interval.high - interval.low) / 2:.3f}"
    return f"$\\mathbf{{{text}}}$" if bold else f"${text}$"


def _escaped(text: str) -> str:
    return " ".join(text.split()).translate(_LATEX)
