"""A small annotation file in MSCOCO's format: things and stuff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

THINGS = {1: "person", 18: "dog", 44: "bottle", 62: "chair", 63: "couch", 67: "dining table", 88: "teddy bear"}
STUFF = {106: "clouds", 157: "sky-other", 171: "wall-brick", 125: "gravel", 183: "other"}
WIDTH, HEIGHT = 640, 480


def annotations(names: dict[int, str], images: int, per_image: int, seed: int) -> dict[str, Any]:
    """As in ``instances_*.json``: boxes are x, y, width, height in pixels."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for image in range(images):
        for number, category in enumerate(rng.permutation(list(names))[:per_image]):
            width, height = (float(v) for v in rng.uniform(0.15, 0.4, 2) * (WIDTH, HEIGHT))
            x, y = float(rng.uniform(0, WIDTH - width)), float(rng.uniform(0, HEIGHT - height))
            bbox = [round(v, 2) for v in (x, y, width, height)]
            rows.append(
                {"id": 1000 * image + number, "image_id": 10 + image, "category_id": int(category), "bbox": bbox,
                 "area": width * height, "iscrowd": 0, "segmentation": []}
            )  # fmt: skip
    size = {"width": WIDTH, "height": HEIGHT}
    return {
        "info": {}, "licenses": [],
        "images": [{"id": 10 + i, **size, "file_name": f"{i:012d}.jpg"} for i in range(images)],
        "categories": [{"id": key, "name": name, "supercategory": "x"} for key, name in names.items()],
        "annotations": rows,
    }  # fmt: skip


def write_coco(folder: Path, images: int = 24) -> tuple[Path, Path]:
    """``instances.json`` and ``stuff.json`` in ``folder``."""
    paths = folder / "instances.json", folder / "stuff.json"
    paths[0].write_text(json.dumps(annotations(THINGS, images, 2, 0)))
    paths[1].write_text(json.dumps(annotations(STUFF, images, 2, 1)))
    return paths
