"""Small datasets on disk, the same examples in every format."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, FileSource, open_files


def level(i: int) -> int:
    """The gray that identifies picture ``i`` after any geometry."""
    return 20 + 10 * i


def picture(i: int, size: tuple[int, int] = (40, 56), mode: str = "RGB") -> Image.Image:
    """All of one gray; ``size`` is (h, w)."""
    return Image.new("L", (size[1], size[0]), level(i)).convert(mode)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_imagefolder(root: Path, count: int = 6, *, masks: bool = True, sizes: Sequence[tuple[int, int]] = ()) -> Path:
    """``count`` gray pictures with condition, mask and caption, each of which says which it is."""
    lines = []
    for i in range(count):
        size = sizes[i % len(sizes)] if sizes else (40, 56)
        for folder in ("images", "conditions", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture(i, size).save(root / folder / f"{i:03}.png")
        line = {
            "file_name": f"images/{i:03}.png",
            "conditioning_image_file_name": f"conditions/{i:03}.png",
            "mask_file_name": f"masks/{i:03}.png",
            "text": f"picture {i}",
        }
        lines.append(line if masks else {k: v for k, v in line.items() if not k.startswith("mask")})
    write_metadata(root, lines)
    return root


def write_metadata(root: Path, lines: Sequence[dict[str, Any]]) -> None:
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metadata(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]


def to_parquet(imagefolder: Path, file: Path) -> Path:
    """The same examples with the pictures inside, as `datasets` writes them; the picture's name is its key."""
    rows: dict[str, list[Any]] = {"image": [], "conditioning_image": [], "mask": [], "text": []}
    for line in read_metadata(imagefolder):
        for column in ("image", "conditioning_image", "mask"):
            name = line["file_name" if column == "image" else f"{column}_file_name"]
            rows[column].append({"bytes": (imagefolder / name).read_bytes(), "path": name})
        rows["text"].append(line["text"])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), file)
    return file


def to_folders(imagefolder: Path, root: Path, condition: str = "depth") -> Path:
    """The same examples as a folder each."""
    for line in read_metadata(imagefolder):
        folder = root / Path(line["file_name"]).stem
        folder.mkdir(parents=True)
        Image.open(imagefolder / line["file_name"]).save(folder / "original.jpg", quality=100)
        Image.open(imagefolder / line["conditioning_image_file_name"]).save(folder / f"{condition}.png")
        if "mask_file_name" in line:
            Image.open(imagefolder / line["mask_file_name"]).save(folder / "mask.png")
        (folder / "caption.txt").write_text(line["text"] + "\n")
    return root


def identities(pixels: np.ndarray) -> list[int]:
    """Which pictures the values in [0,1] show; asserts that each is whole."""
    values = np.round(np.asarray(pixels, dtype=np.float64).reshape(len(pixels), -1) * 255)
    assert (np.ptp(values, axis=1) <= 2).all()
    return [round((value - 20) / 10) for value in values.mean(axis=1)]


def opened(path: Path, name: str, kind: str = "canny", **options: Any) -> FileSource:
    """What was written to ``path``, all of it to train on."""
    data = DataConfig(name=name, path=str(path), resolution=32, validation_share=0, **options)
    return open_files(data, ConditionConfig(kind=kind), "train")
