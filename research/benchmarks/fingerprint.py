"""Measure the fingerprints that detect a changed dataset or base on resuming: seconds and memory.

  python -m research.benchmarks.fingerprint [--rows 500000] [--base sd15]

Rows of metadata.jsonl and of parquet are written to a temporary folder first; they share 1,000 images.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, open_files
from localctl.training.resume import fingerprints
from research.benchmarks.shapes import random_pipeline

IMAGES = 1000


def image(number: int) -> bytes:
    """Return a PNG of 64x64 pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    """Return a caption of usual length."""
    return f"photo {number} of a street in the rain, with people, umbrellas and the lights of a shop behind them"


def imagefolder(root: Path, rows: int) -> DataConfig:
    """Write a folder with metadata.jsonl, and return its settings."""
    (root / "images").mkdir(parents=True)
    for number in range(IMAGES):
        (root / "images" / f"{number}.png").write_bytes(image(number))
    with (root / "metadata.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"file_name": f"images/{number % IMAGES}.png", "text": caption(number)}) + "\n")
    return DataConfig(path=str(root), resolution=64, validation_share=0)


def parquet(root: Path, rows: int) -> DataConfig:
    """Write a parquet file, and return its settings."""
    root.mkdir(parents=True)
    images = [{"bytes": image(number), "path": None} for number in range(IMAGES)]
    table = pa.table(
        {"image": [images[n % IMAGES] for n in range(rows)], "text": [caption(number) for number in range(rows)]}
    )
    pq.write_table(table, root / "all.parquet")
    return DataConfig(name="parquet", path=str(root), resolution=64, validation_share=0, cache_dir=str(root / "cache"))


def timed(what: str, work: Callable[[], Any]) -> Any:
    """Run ``work`` and return its result; print its seconds and by how much it raised the peak memory."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begun
    print(f"{what}: {seconds:.2f} s, {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB")
    return result


def main() -> None:
    """Print the costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--base", default="sd15", choices=("sd15", "sd21", "sdxl"), help="shape of the U-Net")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("metadata.jsonl", imagefolder), ("parquet", parquet)):
            data, rows = make(Path(folder) / make.__name__, args.rows), f"{name}, {args.rows} rows"
            source = timed(f"{rows}, opened", partial(open_files, data, ConditionConfig(), "train"))
            timed(f"{rows}, fingerprints", partial(getattr, source, "fingerprints"))
    unet = random_pipeline(args.base, torch.device("cpu"), torch.float32).unet
    count = sum(parameter.numel() for parameter in unet.parameters())
    timed(
        f"U-Net of {args.base}, {count / 1e6:.0f} million values, fingerprints", partial(fingerprints, {"unet": unet})
    )


if __name__ == "__main__":
    main()
