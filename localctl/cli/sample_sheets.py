"""What stands on contact sheets of images with regions: labels, and what the reader of micro scenes finds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from localctl.boxes import Found, box_around
from localctl.layout import Layout, Region


def verdict(image: Image.Image, layout: Layout) -> list[str]:
    """Say in one line per region with words whether the reader of micro scenes finds its object, and its IoU with the
    box."""
    from localctl.metrics.detection import best_matches
    from localctl.micro.detect import find_objects

    masks = layout.masks((image.height, image.width))[:, 0]
    wanted = [
        Found(_object(region), box_around(mask.numpy()))
        for region, mask in zip(layout.regions, masks, strict=True)
        if region.phrase
    ]
    matches = best_matches(wanted, find_objects(np.asarray(image.convert("RGB"))))
    return [
        f"{item.label}: {'missing' if match is None else f'IoU {match:.2f}'}"
        for item, match in zip(wanted, matches, strict=True)
    ]


def axis_labels(labels: Mapping[tuple[int, int], str]) -> tuple[list[str], list[str]]:
    """Split labels of a sweep into columns' and rows', from the label of each (column, row)."""
    columns, rows = (max(place[axis] for place in labels) + 1 for axis in (0, 1))
    parts = {place: label.split(" ") for place, label in labels.items()}
    of_columns = [parts[column, 0][0] for column in range(columns)]
    return of_columns, [parts[0, row][1] for row in range(rows)] if rows > 1 else []


def _object(region: Region) -> str:
    """The phrase without its article, as the reader names objects."""
    words = (region.phrase or "").split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words)
