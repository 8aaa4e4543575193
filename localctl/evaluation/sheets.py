"""Contact sheets of a comparison: the best, median and worst images of a set beside those of the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from localctl.drawing import grid, outline
from localctl.evaluation.compare import Comparison
from localctl.evaluation.generated_set import GeneratedImage, read_images
from localctl.metrics.edges import canny

PER_GROUP = 3


def ranked(comparison: Comparison, name: str, column: str) -> list[tuple[str, int]]:
    """Choose up to three best, three median and three worst samples of a set by ``column``.

    Returns ("best", "median" or "worst", index of the sample), highest value first, each sample once. Samples where
    ``column`` is undefined are left out.
    """
    values = comparison.tables[name][:, comparison.columns.index(column)]
    order = [int(i) for i in np.argsort(-values, kind="stable") if not np.isnan(values[i])]
    middle = max(0, (len(order) - PER_GROUP) // 2)
    groups = {"best": order[:PER_GROUP], "median": order[middle : middle + PER_GROUP], "worst": order[-PER_GROUP:]}
    chosen: dict[int, str] = {}
    for what, indices in groups.items():
        for index in indices:
            chosen.setdefault(index, what)
    return [(what, index) for index, what in sorted(chosen.items(), key=lambda item: order.index(item[0]))]


def contact_sheet(comparison: Comparison, folders: Mapping[str, Path], name: str, column: str = "f1") -> Image.Image:
    """Compose a sheet of the chosen samples: image of the base, image of the set ``name`` and its edges, with the mask
    outlined. ValueError when no sample has a value in ``column``."""
    chosen = ranked(comparison, name, column)
    ids = [comparison.ids[index] for _, index in chosen]
    values = comparison.tables[name][:, comparison.columns.index(column)]
    rows, labels = [], []
    pairs = zip(read_images(folders[comparison.floor], ids), read_images(folders[name], ids), strict=True)
    for (what, index), (base, made) in zip(chosen, pairs, strict=True):
        edges = (canny(made.image) * 255).astype(np.uint8)[..., None].repeat(3, -1)
        rows.append([_outlined(image, made) for image in (base.image, made.image, edges)])
        labels.append(f"{what} {column} {values[index]:.2f}: {made.id} {made.caption}")
    return grid(rows, (comparison.floor, name, f"edges of {name}"), labels)


def _outlined(image: np.ndarray, made: GeneratedImage) -> Image.Image:
    return outline(Image.fromarray(image), torch.from_numpy(made.mask))
