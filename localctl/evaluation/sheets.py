"""Contact sheets of a comparison: for each drawn set its best, median and worst pictures beside the base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from localctl.drawing import grid, outline
from localctl.evaluation.compare import Comparison
from localctl.evaluation.generated_set import Drawn, read_pictures
from localctl.metrics.edges import canny

EACH = 3


def ranked(comparison: Comparison, name: str, column: str) -> list[tuple[str, int]]:
    """(what, index) of up to three best, median and worst samples of a set by ``column``, highest first, each once;
    samples where it is undefined are left out."""
    values = comparison.tables[name][:, comparison.columns.index(column)]
    order = [int(i) for i in np.argsort(-values, kind="stable") if not np.isnan(values[i])]
    middle = max(0, (len(order) - EACH) // 2)
    groups = {"best": order[:EACH], "median": order[middle : middle + EACH], "worst": order[-EACH:]}
    chosen: dict[int, str] = {}
    for what, indices in groups.items():
        for index in indices:
            chosen.setdefault(index, what)
    return [(what, index) for index, what in sorted(chosen.items(), key=lambda item: order.index(item[0]))]


def contact_sheet(comparison: Comparison, folders: Mapping[str, Path], name: str, column: str = "f1") -> Image.Image:
    """What the base draws, what the set ``name`` draws, and the latter's edges, with the masks' outlines. ValueError
    when no sample has a value in ``column``."""
    chosen = ranked(comparison, name, column)
    ids = [comparison.ids[index] for _, index in chosen]
    values = comparison.tables[name][:, comparison.columns.index(column)]
    rows, labels = [], []
    pairs = zip(read_pictures(folders[comparison.floor], ids), read_pictures(folders[name], ids), strict=True)
    for (what, index), (base, drawn) in zip(chosen, pairs, strict=True):
        edges = (canny(drawn.image) * 255).astype(np.uint8)[..., None].repeat(3, -1)
        rows.append([_outlined(picture, drawn) for picture in (base.image, drawn.image, edges)])
        labels.append(f"{what} {column} {values[index]:.2f}: {drawn.id} {drawn.caption}")
    return grid(rows, (comparison.floor, name, f"edges of {name}"), labels)


def _outlined(picture: np.ndarray, drawn: Drawn) -> Image.Image:
    return outline(Image.fromarray(picture), torch.from_numpy(drawn.mask))
