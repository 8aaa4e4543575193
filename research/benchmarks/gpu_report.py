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
A10G_TFLOPS = 70.0  # matrix products in bf16, from its data sheet: it was not measured

_TRAINING: Sequence[Column] = (
    ("base", lambda row: f"{row['base']} {row['side']} px, batch {row['batch']}"),
    ("step", lambda row: row["variant"]),
    ("ms per step", lambda row: f"{row['ms']:.0f} ({row['ms_low']:.0f} to {row['ms_high']:.0f})"),
    ("images/s", lambda row: f"{row['images_per_second']:.1f}"),
    ("TFLOP/s", lambda row: f"{row['tflops']:.0f}"),
    ("of the peak", lambda row: f"{row['share_of_peak']:.0%}"),
    ("memory, GiB", lambda row: f"{row['gib']:.1f}"),
    ("first step, s", lambda row: f"{row['first_step_seconds']:.1f}"),
    ("times as fast", lambda row: f"{row['times']:.2f} ({row['times_low']:.2f} to {row['times_high']:.2f})"),
    ("as", lambda row: row["faster_than"]),
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
_PROFILE: Sequence[Column] = (
    ("operation", lambda row: f"`{row['operation']}`"),
    ("ms per step", lambda row: f"{row['ms']:.1f}"),
    ("share", lambda row: f"{row['share']:.0%}"),
    ("calls", lambda row: f"{row['calls']:.0f}"),
)


def read(path: Path) -> list[Row]:
    """Return the rows of a file of results."""
    return [json.loads(text) for text in path.read_text().splitlines()]


def report(rows: Sequence[Row]) -> str:
    """Return the tables of ``rows``, and what was skipped or failed."""
    found = next(row for row in rows if row["part"] == "machine")
    tiny = ", tiny shapes: the figures mean nothing" if found["tiny"] else ""
    lines = [f"{found['card']}, torch {found['torch']}, diffusers {found['diffusers']}{tiny}.", *_sentences(rows)]
    for key, columns in (("variant", _TRAINING), ("control", _CONTROLS), ("what", _ENCODERS), ("operation", _PROFILE)):
        if of_kind := [row for row in rows if key in row]:
            cells = [[cell(row) for _, cell in columns] for row in of_kind]
            lines += ["", *head([name for name, _ in columns]), *map(line, cells)]
    lines += _recipe(rows)
    missing = [f"{row['part']}: {why}" for row in rows if (why := row.get("skipped") or row.get("error"))]
    return "\n".join([*lines, *(["", "Not measured: " + "; ".join(missing) + "."] if missing else [])])


def _sentences(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "gb_per_second" in row:
            lines.append(f"A {row['name']}: {row['gb_per_second']:.0f} GB/s.")
        elif "profile" in row:
            lines.append(
                f"The cached step under the profiler: {row['ms']:.0f} ms, its kernels {row['busy']:.0%} of it; "
                f"{row['kernels']:.0f} kernels."
            )
        elif row["part"] == "limits" and "tflops" in row:
            lines.append(f"A {row['name']}: {row['tflops']:.0f} TFLOP/s, the peak of the tables.")
    return lines


def _recipe(rows: Sequence[Row]) -> list[str]:
    """Return what the published recipe costs, by calculation from the images per second of SD1.5."""
    speed = {
        row["variant"]: row for row in rows if row.get("base") == "sd15" and row.get("batch") == 16 and "variant" in row
    }
    encoders = {row["what"]: row["per_second"] for row in rows if "what" in row}
    if not {"cached", "live"} <= speed.keys() or "images" not in encoders:
        return []
    cards = {"this card": (1.0, 1), "8 of them": (1.0, 8), "A10G": (A10G_TFLOPS / (speed["cached"]["peak"]), 1)}
    body = []
    for name, (factor, count) in cards.items():
        hours = {what: IMAGES * EPOCHS / speed[what]["images_per_second"] / 3600 / factor / count for what in speed}
        encode = IMAGES * (1 / encoders["images"] + 1 / encoders["captions"]) / 3600 / factor / count
        best = hours.get("cached, compiled", hours["cached"])
        cells = [encode, hours["cached"], best, hours["live"], hours.get("plain step", float("nan"))]
        body.append(line([name, *(f"{value:.0f} h" if value >= 10 else f"{value:.1f} h" for value in cells)]))
    columns = ["", "caching once", "training, cached", "cached, compiled", "training, live", "plain step"]
    return ["", *head(columns), *body]


def write_page(page: Path, text: str) -> None:
    """Replace what ``page`` has between its two markers by ``text``. ValueError if they are missing."""
    before, begun, rest = page.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"{page} has no place for the tables; add the lines {BEGIN} and {END}.")
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{after}")
