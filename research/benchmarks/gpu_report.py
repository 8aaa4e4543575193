"""The tables of a GPU benchmark, in Markdown, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]

_TRAINING: Sequence[Column] = (
    ("base", lambda row: f"{row['base']} {row['side']} px, batch {row['batch']}"),
    ("step", lambda row: row["variant"]),
    ("ms per step", lambda row: f"{row['ms']:.0f} ({row['ms_low']:.0f} to {row['ms_high']:.0f})"),
    ("images/s", lambda row: f"{row['images_per_second']:.1f}"),
    ("TFLOP/s", lambda row: f"{row['tflops']:.0f}"),
    ("of the peak", lambda row: f"{row['share_of_peak']:.0%}"),
    ("memory, GiB", lambda row: f"{row['gib']:.1f}"),
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


def report(rows: Sequence[Row]) -> str:
    """Return the tables of ``rows``, and what was skipped or failed."""
    found = next(row for row in rows if row["part"] == "machine")
    lines = [
        f"{found['card']}, torch {found['torch']}, diffusers {found['diffusers']}"
        + (", tiny shapes: the figures mean nothing" if found["tiny"] else "")
        + "."
    ]
    for row in rows:
        if "gb_per_second" in row:
            lines.append(f"{row['name']}: {row['gb_per_second']:.0f} GB/s.")
        elif "profile" in row:
            lines.append(
                f"Profile of the cached step: {row['ms']:.0f} ms, its kernels {row['busy']:.0%} of it; "
                f"{row['kernels']:.0f} kernels."
            )
        elif row["part"] == "limits" and "tflops" in row:
            lines.append(f"{row['name']}: {row['tflops']:.0f} TFLOP/s, the peak of the tables.")
    for key, columns in (("variant", _TRAINING), ("control", _CONTROLS), ("what", _ENCODERS), ("operation", _PROFILE)):
        if of_kind := [row for row in rows if key in row]:
            lines += ["", *table(of_kind, columns)]
    missing = [f"{row['part']}: {why}" for row in rows if (why := row.get("skipped") or row.get("error"))]
    return "\n".join([*lines, *(["", "Not measured: " + "; ".join(missing) + "."] if missing else [])])


def table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return the lines of a Markdown table."""
    head = [name for name, _ in columns]
    body = [[cell(row) for _, cell in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
