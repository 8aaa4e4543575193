"""The tables of a GPU benchmark, in Markdown, from its rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from localctl.evaluation.provenance import write_text
from localctl.evaluation.tables import head, line

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]

BEGIN, END = "<!-- gpu tables -->", "<!-- end of gpu tables -->"
IMAGES, EPOCHS = 600_000, 10  # of the published recipe
A10G_TFLOPS = 70.0  # matrix products in bf16, assumed: it was not measured


def _times(row: Row) -> str:
    if row["variant"] == row["faster_than"]:
        return ""
    return f"{row['times']:.2f} ({row['times_low']:.2f} to {row['times_high']:.2f}) as the {row['faster_than']}"


_TRAINING: Sequence[Column] = (
    ("base", lambda row: f"{row['base']} {row['side']} px, batch {row['batch']}"),
    ("step", lambda row: row["variant"]),
    ("ms per step", lambda row: f"{row['ms']:.0f} ({row['ms_low']:.0f} to {row['ms_high']:.0f})"),
    ("images/s", lambda row: f"{row['images_per_second']:.1f}"),
    ("TFLOP/s", lambda row: f"{row['tflops']:.0f}"),
    ("of the peak", lambda row: f"{row['share_of_peak']:.0%}"),
    ("memory, GiB", lambda row: f"{row['gib']:.1f}"),
    ("first step, s", lambda row: f"{row['first_step_seconds']:.1f}"),
    ("times as fast", _times),
)

_CONTROLS: Sequence[Column] = (
    ("base", lambda row: f"{row['base']} {row['side']} px, batch {row['batch']}"),
    ("control", lambda row: row["control"]),
    ("ms per step", lambda row: f"{row['ms_per_step']:.1f}"),
    (
        "overhead",
        lambda row: f"{row['overhead']:+.1%} ({row['overhead_low']:+.1%} to {row['overhead_high']:+.1%})",
    ),
    ("memory, GiB", lambda row: f"{row['gib']:.1f}"),
)
_ENCODERS: Sequence[Column] = (
    ("base", lambda row: f"{row['base']} {row['side']} px"),
    ("encoded", lambda row: f"{row['what']}, {row['batch']} at once"),
    ("per second", lambda row: f"{row['per_second']:.0f}"),
)


def read(*paths: Path) -> list[Row]:
    """Return the rows of files of results; those of several files have the number of their run."""
    runs = [[json.loads(text) for text in path.read_text().splitlines()] for path in paths]
    if len(runs) == 1:
        return runs[0]
    return [{"run": number, **row} for number, rows in enumerate(runs, 1) for row in rows]


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return a table with a line for each row."""
    cells = [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join([*head([name for name, _ in columns]), *map(line, cells)])


def report(rows: Sequence[Row]) -> str:
    """Return the tables of ``rows``, and what was skipped or failed."""
    lines = [_sentences(run) for run in _runs(rows)]
    for key, columns in (("variant", _TRAINING), ("control", _CONTROLS), ("what", _ENCODERS)):
        if of_kind := [row for row in rows if key in row]:
            shown = [("run", lambda row: str(row["run"])), *columns] if "run" in rows[0] else columns
            lines.append(table(shown, of_kind))
    lines += [*_profiles(rows), *_recipe(rows)]
    missing = [f"{_named(row, row['part'])}: {why}" for row in rows if (why := row.get("skipped") or row.get("error"))]
    return "\n\n".join([*lines, *(["Not measured: " + "; ".join(missing) + "."] if missing else [])])


def _runs(rows: Sequence[Row]) -> list[list[Row]]:
    numbers = dict.fromkeys(row.get("run") for row in rows)
    return [[row for row in rows if row.get("run") == number] for number in numbers]


def _named(row: Row, name: str) -> str:
    return f"run {row['run']}, {name}" if "run" in row else name


def _sentences(rows: Sequence[Row]) -> str:
    found = next(row for row in rows if row["part"] == "machine")
    tiny = ", tiny shapes: the figures mean nothing" if found["tiny"] else ""
    name = _named(found, f"{found['card']}, torch {found['torch']}, diffusers {found['diffusers']}{tiny}")
    note = f" ({found['note']})" if found.get("note") else ""
    lines = [f"{name[0].upper()}{name[1:]}{note}."]
    for row in rows:
        if "gb_per_second" in row:
            lines.append(f"A {row['name']}: {row['gb_per_second']:.0f} GB/s.")
        elif "profile" in row:
            lines.append(
                f"Under the profiler, {row['profile']}: {row['ms']:.0f} ms, its kernels {row['ms'] * row['busy']:.1f} "
                f"ms or {row['busy']:.0%} of it; {row['kernels']:.0f} kernels."
            )
        elif row["part"] == "limits" and "tflops" in row:
            lines.append(f"A {row['name']}: {row['tflops']:.0f} TFLOP/s, the peak of the tables.")
    return "\n".join(lines)


def _profiles(rows: Sequence[Row]) -> list[str]:
    """Return the table of operations: a column for each profile."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if "operation" in row:
            name = _named(row, row.get("of", "cached step"))
            cells.setdefault(row["operation"], {})[name] = f"{row['ms']:.1f} ({row['share']:.0%}), {row['calls']:.0f}"
    names = list(dict.fromkeys(name for of_one in cells.values() for name in of_one))
    body = [line([f"`{operation}`", *(of_one.get(name, "") for name in names)]) for operation, of_one in cells.items()]
    return ["\n".join([*head(["ms per step (share), calls", *names]), *body])] if cells else []


def _recipe(rows: Sequence[Row]) -> list[str]:
    """Return what the published recipe costs, by calculation from the images per second of SD1.5 in batches of 16."""
    shown = ("cached", "cached, compiled", "live", "plain step")
    body = []
    for run in _runs(rows):
        steps = {row["variant"]: row for row in run if "variant" in row and (row["base"], row["batch"]) == ("sd15", 16)}
        encoders = {row["what"]: row["per_second"] for row in run if "what" in row}
        if not encoders or "cached" not in steps:
            continue
        once = IMAGES * (1 / encoders["images"] + 1 / encoders["captions"]) / 3600
        hours = [once, *(_hours(steps.get(name)) for name in shown)]
        a10g = f"A10G, {A10G_TFLOPS:.0f} TFLOP/s assumed"
        cards = {"this card": 1.0, "8 of them": 8.0, a10g: A10G_TFLOPS / steps["cached"]["peak"]}
        for card, times in cards.items():
            cells = ["" if value is None else f"{value / times:.1f}" for value in hours]
            body.append(line([_named(run[0], card), *cells]))
    return ["\n".join([*head(["hours", "caching once", *shown]), *body])] if body else []


def _hours(row: Row | None) -> float | None:
    return None if row is None else IMAGES * EPOCHS / row["images_per_second"] / 3600


def write_page(page: Path, text: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace what ``page`` has between its two markers by ``text``. ValueError if they are missing."""
    begin, end = marks
    before, begun, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"{page} has no place for the tables; add the lines {begin} and {end}.")
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")
