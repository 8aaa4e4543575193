"""The tables of what transformers cost, in Markdown, from stored rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from localctl.evaluation.tables import head, line
from research.benchmarks.gpu_report import Column, Row, table
from research.benchmarks.timing import GIB

BYTES: Mapping[str, float] = {"bf16": 2, "8 bit": 1, "4 bit": 0.5}  # of a frozen weight, without scales
MARKS = ("<!-- cost tables -->", "<!-- end of cost tables -->")  # on the page
TRAINED = 16  # bytes of a trained float32 parameter: itself, its gradient, both moments of AdamW


def read_rows(folder: Path) -> list[Row]:
    """Return the stored rows of a folder."""
    return [json.loads(text) for path in sorted(folder.glob("*.jsonl")) for text in path.read_text().splitlines()]


def weights(row: Row, name: str) -> str:
    """Return the GiB of the frozen transformer in a format of weights."""
    return f"{row['parameters'] * BYTES[name] / GIB:.1f}"


def needed(row: Row, name: str) -> str:
    """Return the GiB of training with checkpointing, the frozen transformer in a format of weights; text encoders, VAE
    and the needs of the device itself come on top."""
    frozen = row["parameters"] * BYTES[name]
    return f"{(frozen + row['adapter_parameters'] * TRAINED) / GIB + row['activations_checkpointed_gib']:.1f}"


_BASES: Sequence[Column] = (
    ("base", lambda row: f"`{row['base']}`"),
    ("parameters", lambda row: f"{row['parameters'] / 1e9:.2f} billion"),
    ("blocks", lambda row: str(row["blocks"])),
    ("width", lambda row: f"{row['width']:,}"),
    *((f"weights, {name}, GiB", lambda row, name=name: weights(row, name)) for name in BYTES),
    ("adapter", lambda row: f"{row['adapter_parameters'] / 1e6:.1f} million, {row['levels']} residuals"),
)
_SIZES: Sequence[Column] = (
    ("base", lambda row: f"`{row['base']}`"),
    ("px", lambda row: str(row["side"])),
    ("tokens, image + text", lambda row: f"{row['image_tokens']:,} + {row['text_tokens']}"),
    ("forward, TFLOP", lambda row: f"{row['forward_tflop']:.2f}"),
    (
        "training step, TFLOP",
        lambda row: f"{row['step_tflop']:.2f} ({row['step_checkpointed_tflop']:.2f} with checkpointing)",
    ),
    (
        "activations, GiB",
        lambda row: f"{row['activations_gib']:.1f} ({row['activations_checkpointed_gib']:.1f})",
    ),
    *((f"training, {name}, GiB", lambda row, name=name: needed(row, name)) for name in BYTES),
)


def overheads(rows: Sequence[Row]) -> str:
    """Return the table of overheads: a line for each base, a column for each control."""
    names = list(dict.fromkeys(row["control"] for row in rows))
    body = []
    for base in dict.fromkeys(row["base"] for row in rows):
        own = {row["control"]: row for row in rows if row["base"] == base}
        pixels = next(iter(own.values()))["pixels"]
        body.append(line([f"`{base}`, {pixels} px", *(_overhead(own.get(name)) for name in names)]))
    return "\n".join([*head(["base", *names]), *body, "", _memory(rows)])


def _memory(rows: Sequence[Row]) -> str:
    plain = {row["base"]: row["peak_mib"] for row in rows if row["control"] == "none"}
    more = max(row["peak_mib"] - plain[row["base"]] for row in rows if "peak_mib" in row)
    return f"Live tensors take at most {math.ceil(more)} MiB more than without controls."


def _overhead(row: Row | None) -> str:
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    if not row["overhead"]:
        return f"{row['ms_per_step']:.0f} ms"
    return f"{row['overhead']:+.0%} ({row['overhead_low']:+.0%} to {row['overhead_high']:+.0%})"


def report(rows: Sequence[Row]) -> str:
    """Return all tables."""
    costs, timed = [row for row in rows if "side" in row], [row for row in rows if "control" in row]
    bases = list({row["base"]: row for row in costs}.values())
    return "\n\n".join([table(_BASES, bases), table(_SIZES, costs), *([overheads(timed)] if timed else [])])
