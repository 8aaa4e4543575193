"""Figures, table and contact sheet of ``research.spacetime``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from localctl.cli.sample_sheets import verdict
from localctl.evaluation.tables import head, line
from localctl.images import captioned, grid
from localctl.layout import Layout
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.metrics.clip import Clip, CLIPScore
from localctl.metrics.detection import micro_detector, micro_shapes
from localctl.metrics.regions import RelationAccuracy
from localctl.micro.scenes import Scene

COLUMNS = ("object recall", "attribute binding", "relation", "CLIP score")
_SIDE = 256  # px of a picture on the sheet


def measure(image: np.ndarray, item: Scene, clip: Clip) -> list[float]:
    """One picture's value for each of ``COLUMNS``, NaN where undefined. ``image``: uint8 (H, W, 3).

    object recall: the share of the caption's objects that are found, by colour and shape. attribute binding: of those
    whose shape is found, the share in the right colour. relation: whether both are found in the stated relation. CLIP
    score: 100 * cosine with the caption.
    """
    assert item.relation is not None
    phrases, shapes = ({found.label for found in look(image)} for look in (micro_detector, micro_shapes))
    there = [wanted.phrase in phrases for wanted in item.objects]
    shaped = [wanted.shape in shapes for wanted in item.objects]
    first, kind, second = item.relation
    relation, score = RelationAccuracy(), CLIPScore(clip)
    relation.update(image, item.objects[first].phrase, kind, item.objects[second].phrase)
    score.update(image, item.caption)
    binding = float(np.mean([t for t, s in zip(there, shaped, strict=True) if s])) if any(shaped) else math.nan
    return [float(np.mean(there)), binding, float(relation.per_sample()[0, 1]), float(score.per_sample()[0, 0])]


def relation_report(tables: Mapping[str, np.ndarray], optimised: int) -> tuple[str, dict[str, Any]]:
    """The report in Markdown and the same figures as plain values.

    ``tables``: (n, columns) per row, NaN where undefined or not drawn; ``optimised``: how many were optimised.
    """
    n = len(next(iter(tables.values())))
    lines = [f"On {n} captions that state a relation", "", *_means(tables), ""]
    lines += ["Means with 95 % bootstrap intervals over the captions where a figure is defined.", ""]
    pairs = [(row, "plain") for row in tables if row != "plain"]
    pairs += [("optimised", "constant"), ("scheduled", "constant")]
    shared = {row: table[:optimised] for row, table in tables.items()}
    if 0 < optimised < n:
        lines += [f"On the {optimised} captions that all rows share", "", *_means(shared), ""]
    lines += head(["paired difference", *COLUMNS])
    figures: dict[str, Any] = {"means": _intervals(tables), "means of the shared": _intervals(shared)}
    figures["differences"] = {}
    for row, other in pairs:
        gains = [difference(tables[row][:, i], tables[other][:, i]) for i in range(len(COLUMNS))]
        lines.append(line([f"{row} - {other}", *(_signed(gain) for gain in gains)]))
        figures["differences"][f"{row} - {other}"] = dict(zip(COLUMNS, map(_plain, gains), strict=True))
    lines += ["", "Paired: same caption, layout and noise; over the captions where both are defined."]
    lines += ["Only the CLIP score was optimised; the other figures were not."]
    return "\n".join(lines) + "\n", figures


def difference(first: np.ndarray, second: np.ndarray) -> Interval | None:
    """Of paired values, NaN left out; None where nothing is left."""
    return _interval(first - second)


def _interval(values: np.ndarray) -> Interval | None:
    values = values[~np.isnan(values)]
    return bootstrap(values) if len(values) else None


def _intervals(tables: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    return {
        row: {column: _plain(_interval(table[:, i])) for i, column in enumerate(COLUMNS)}
        for row, table in tables.items()
    }


def _means(tables: Mapping[str, np.ndarray]) -> list[str]:
    lines = head(["", "captions", *COLUMNS])
    for row, table in tables.items():
        drawn = int((~np.isnan(table[:, 0])).sum())
        cells = [_interval(table[:, i]) for i in range(len(COLUMNS))]
        lines.append(line([row, str(drawn), *("undefined" if cell is None else str(cell) for cell in cells)]))
    return lines


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)


def _signed(gain: Interval | None) -> str:
    if gain is None:
        return "undefined"
    said = "" if gain.low > 0 or gain.high < 0 else ", no difference"
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] of {gain.n}{said}"


def relation_sheet(
    layouts: Sequence[Layout], pictures: Mapping[str, Sequence[Image.Image]], rows: int = 8
) -> Image.Image:
    """One line per caption: the layout, then each row's picture with the layout drawn and the reader's verdict."""
    lines, captions = [], []
    for index, layout in enumerate(layouts[:rows]):
        cells = [layout.draw(Image.new("RGB", (_SIDE, _SIDE), "white"))]
        for some in pictures.values():
            if index < len(some):
                shown = layout.draw(some[index].resize((_SIDE, _SIDE)))
                cells.append(captioned(shown, verdict(some[index], layout)))
        lines.append(cells)
        captions.append(layout.prompt)
    return grid(lines, ["layout", *pictures][: max(map(len, lines))], captions)
