"""Compute the figures of ``research.spacetime``, and write its tables and contact sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from localctl.boxes import Found, box_around
from localctl.drawing import captioned, grid, render_layout
from localctl.jobs.sheets import verdict
from localctl.layout import Layout
from localctl.metrics.bootstrap import Interval
from localctl.metrics.clip import Clip, CLIPScore
from localctl.metrics.regions import RegionAccuracy, RelationAccuracy
from localctl.micro.detect import find_objects, find_shapes
from localctl.micro.scenes import SIZE, Scene
from research.page import cell, interval, signed, table

COLUMNS = ("object recall", "attribute binding", "relation", "CLIP score", "in place")  # the last is new
_SIDE = 256  # px of an image on the sheet


def measure(image: np.ndarray, item: Scene, layout: Layout, clip: Clip) -> list[float]:
    """Return the values of ``COLUMNS`` for an image uint8 (H, W, 3), NaN where undefined.

    object recall: share of the caption's objects that are found, by colour and shape. attribute binding: of the
    objects whose shape is found, the share in the right colour. relation: 1 if both objects are found in the stated
    relation, else 0. CLIP score: 100 * cosine with the caption.
    """
    assert item.relation is not None
    phrases, shapes = ({found.label for found in find(image)} for find in (find_objects, find_shapes))
    there = [wanted.phrase in phrases for wanted in item.objects]
    shaped = [wanted.shape in shapes for wanted in item.objects]
    first, kind, second = item.relation
    relation, score, placed = RelationAccuracy(find_objects), CLIPScore(clip), RegionAccuracy(find_objects)
    masks = layout.masks((SIZE, SIZE))[:, 0].numpy()
    placed.update(image, [Found(r.phrase or "", box_around(m)) for r, m in zip(layout.regions, masks, strict=True)])
    relation.update(image, item.objects[first].phrase, kind, item.objects[second].phrase)
    score.update(image, item.caption)
    binding = float(np.mean([t for t, s in zip(there, shaped, strict=True) if s])) if any(shaped) else math.nan
    seen = float(np.mean(there)), binding, float(relation.per_sample()[0, 1]), float(score.per_sample()[0, 0])
    return [*seen, float(np.mean(placed.per_sample()[:, 0]))]


def relation_report(tables: Mapping[str, np.ndarray], optimised: int) -> tuple[str, dict[str, Any]]:
    """Return the report in Markdown, and the same figures as plain values.

    tables: (n, columns) per row, NaN where undefined or not generated. optimised: number of optimised captions.
    """
    n, columns = len(next(iter(tables.values()))), _columns(*tables.values())
    shared = {row: values[:optimised] for row, values in tables.items()}
    pairs = [(row, "plain") for row in tables if row != "plain"]
    pairs += [("optimised", "constant"), ("scheduled", "constant")]
    gains = {f"{row} - {other}": _intervals(tables[row] - tables[other]) for row, other in pairs}
    lines = [f"On {n} captions that state a relation", "", *_means(tables), ""]
    lines += ["Means with 95 % bootstrap intervals over the captions where a figure is defined.", ""]
    if 0 < optimised < n:
        lines += [f"On the {optimised} captions that all rows share", "", *_means(shared), ""]
    lines += table(columns, ((pair, map(_gain, found)) for pair, found in gains.items()), "paired difference")
    lines += ["", "Paired: same caption, layout and noise; over the captions where both are defined."]
    lines += ["Only the CLIP score was optimised; the other figures were not."]
    figures = {
        "means": {row: _plain(_intervals(values)) for row, values in tables.items()},
        "means of the shared": {row: _plain(_intervals(values)) for row, values in shared.items()},
        "differences": {pair: _plain(found) for pair, found in gains.items()},
    }
    return "\n".join(lines) + "\n", figures


def against_report(tables: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> str:
    """Return the paired differences of each row to each row of another run on the same captions, in Markdown."""
    there = [{row: some for row, some in run.items() if not np.isnan(some).all()} for run in (tables, others)]
    columns = _columns(*there[0].values(), *there[1].values())
    here, other = ({row: some[:, : len(columns)] for row, some in run.items()} for run in there)
    rows = [(f"{a} - {b}", map(_gain, _intervals(here[a] - other[b]))) for a in here for b in other]
    return "\n".join(["", *table(columns, rows, "this run - the other run"), ""])


def _columns(*tables: np.ndarray) -> tuple[str, ...]:
    """Return the columns that all tables have; results of earlier versions have fewer."""
    return COLUMNS[: min(len(values.T) for values in tables)]


def _intervals(values: np.ndarray) -> list[Interval | None]:
    """Return one interval per column."""
    return [interval(column) for column in values.T]


def _means(tables: Mapping[str, np.ndarray]) -> list[str]:
    rows = []
    for row, values in tables.items():
        known = int((~np.isnan(values[:, 0])).sum())
        rows.append((row, [str(known), *map(cell, _intervals(values))]))
    return table(["captions", *_columns(*tables.values())], rows)


def _plain(found: Sequence[Interval | None]) -> dict[str, Any]:
    return {name: None if one is None else asdict(one) for name, one in zip(COLUMNS, found, strict=False)}


def _gain(found: Interval | None) -> str:
    if found is None:
        return signed(found)
    note = "" if found.low > 0 or found.high < 0 else ", no difference"
    return f"{signed(found)} of {found.n}{note}"


def relation_sheet(
    layouts: Sequence[Layout], images: Mapping[str, Sequence[Image.Image]], rows: int = 8
) -> Image.Image:
    """Return a sheet, a line per caption: the layout, then each row's image with outlines and the reader's verdict."""
    lines, captions = [], []
    for index, layout in enumerate(layouts[:rows]):
        cells = [render_layout(layout, Image.new("RGB", (_SIDE, _SIDE), "white"))]
        for some in images.values():
            if index < len(some):
                outlined = render_layout(layout, some[index].resize((_SIDE, _SIDE)))
                cells.append(captioned(outlined, verdict(some[index], layout)))
        lines.append(cells)
        captions.append(layout.prompt)
    return grid(lines, ["layout", *images][: max(map(len, lines))], captions)
