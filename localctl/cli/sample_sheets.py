"""Contact sheets of pictures with regions: outlines drawn, and what the reader found under each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from localctl.images import captioned, grid
from localctl.layout import Layout, Region
from localctl.metrics.detection import Box, Found, best_matches, micro_detector

_SMALLEST = 256  # px; smaller pictures are enlarged, so that words fit under them


def verdict(picture: Image.Image, layout: Layout) -> list[str]:
    """One line per region with words: whether the reader of micro scenes finds its object, and its IoU with the box."""
    wanted = [
        Found(_object(region), _box(layout, index, picture.size))
        for index, region in enumerate(layout.regions)
        if region.phrase
    ]
    found = micro_detector(np.asarray(picture.convert("RGB")))
    matches = best_matches(wanted, found)
    return [
        f"{item.label}: {'missing' if match is None else f'IoU {match:.2f}'}"
        for item, match in zip(wanted, matches, strict=True)
    ]


def region_sheet(
    rows: Sequence[Sequence[Image.Image]],
    layouts: Sequence[Layout],
    columns: Sequence[str],
    captions: Sequence[str],
    read: bool,
) -> Image.Image:
    """Pictures with the outlines of their row's layout, labelled; with ``read``, the reader's verdict under each."""
    cells: list[list[Image.Image]] = []
    for row, layout in zip(rows, layouts, strict=True):
        cells.append([])
        for picture in row:
            factor = -(-_SMALLEST // picture.width)
            shown = layout.draw(picture.resize((factor * picture.width, factor * picture.height)))
            cells[-1].append(captioned(shown, verdict(picture, layout)) if read else shown)
    return grid(cells, columns, captions)


def axis_labels(labels: Mapping[tuple[int, int], str]) -> tuple[list[str], list[str]]:
    """Columns' and rows' labels of a sweep, from the label of each (column, row)."""
    columns, rows = (max(place[axis] for place in labels) + 1 for axis in (0, 1))
    parts = {place: label.split(" ") for place, label in labels.items()}
    of_columns = [parts[column, 0][0] for column in range(columns)]
    return of_columns, [parts[0, row][1] for row in range(rows)] if rows > 1 else []


def _object(region: Region) -> str:
    """The phrase without its article, as the reader names objects."""
    words = (region.phrase or "").split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words)


def _box(layout: Layout, index: int, size: tuple[int, int]) -> Box:
    """The smallest box (pixels, xyxy) round a region in a picture of ``size`` = (width, height)."""
    mask = layout.masks((size[1], size[0]))[index, 0]
    ys, xs = (mask >= mask.max() / 2).nonzero().unbind(dim=1)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)
