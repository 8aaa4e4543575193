"""Measure what a large dataset costs: seconds and memory until the first step, and memory while training.

  python -m research.benchmarks.open_data [--rows 500000] [--steps 300]

Rows of metadata.jsonl and of parquet, which share 1,000 images, are written to a temporary folder. Each part runs in a
process of its own. Memory is the resident set without mapped files, which the system drops when it needs space: its
growth above the imports, and while training its mean in each third of the steps. Last, the fingerprints of a U-Net's
weights, which resuming compares. The exit status is 1 if the last third differs from the second by more than 3 %.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image

from localctl.conditions import ConditionConfig
from localctl.data import BucketPlan, DataConfig, FileSource, SamplePlan, open_files
from localctl.data.files import part_of
from localctl.pipelines import BaseConfig
from localctl.training.data import in_buckets
from localctl.training.loop import prepare
from localctl.training.resume import fingerprints
from localctl.training.settings import TrainSettings
from localctl.training.summary import remarks
from research.benchmarks.shapes import random_pipeline

MIB = 2**20
FLAT = 0.03
SIDE = 64
IMAGES = 1000
BUCKETS = "64,64;64,96;96,64"


def image(number: int) -> bytes:
    """Return a PNG of 64x64 pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    """Return a caption of usual length."""
    return f"photo {number} of a street in the rain, with people, umbrellas and the lights of a shop behind them"


def imagefolder(root: Path, rows: int) -> dict[str, str]:
    """Write a folder with metadata.jsonl, and return its settings."""
    (root / "images").mkdir(parents=True)
    for number in range(IMAGES):
        (root / "images" / f"{number}.png").write_bytes(image(number))
    with (root / "metadata.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"file_name": f"images/{number % IMAGES}.png", "text": caption(number)}) + "\n")
    return {"path": str(root)}


def parquet(root: Path, rows: int) -> dict[str, str]:
    """Write a parquet file, and return its settings."""
    root.mkdir(parents=True)
    images = [{"bytes": image(number), "path": None} for number in range(IMAGES)]
    table = pa.table(
        {"image": [images[n % IMAGES] for n in range(rows)], "text": [caption(number) for number in range(rows)]}
    )
    pq.write_table(table, root / "all.parquet")
    return {"name": "parquet", "path": str(root), "cache_dir": str(root / "cache")}


def resident() -> float:
    """Return the resident set of this process in MiB, without mapped files."""
    _, pages, mapped = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (pages - mapped) * os.sysconf("SC_PAGE_SIZE") / MIB


class Costs:
    """Prints the seconds of pieces of work, and by how much they raise the resident set."""

    def __init__(self, name: str) -> None:
        self.name, self.start = name, resident()
        self.begun, self.busy = time.perf_counter(), time.process_time()

    def of(self, what: str, work: Callable[[], Any]) -> Any:
        """Return the result of ``work``."""
        begun, busy = time.perf_counter(), time.process_time()
        result = work()
        seconds, busy = time.perf_counter() - begun, time.process_time() - busy
        memory = resident() - self.start
        print(f"{self.name}, {what}: {seconds:.2f} s ({busy:.2f} of CPU), {memory:+.0f} MiB so far", flush=True)
        return result

    def total(self) -> None:
        """Print the sum."""
        seconds, busy = time.perf_counter() - self.begun, time.process_time() - self.busy
        memory = resident() - self.start
        print(f"{self.name}, in all: {seconds:.2f} s ({busy:.2f} of CPU), {memory:+.0f} MiB", flush=True)


def opening(name: str, data: DataConfig, folder: Path) -> None:
    """Print what happens with the rows before the first step."""
    datasets.disable_progress_bars()
    costs = Costs(name)
    settings = TrainSettings(data=data)
    train: FileSource = costs.of("opened", lambda: open_files(data, ConditionConfig(), "train"))
    costs.of("held-out part", lambda: part_of(train.rows, data, ConditionConfig(), "val"))
    costs.of("fingerprints", lambda: train.fingerprints)
    costs.of("remarks", lambda: remarks(settings, train))
    costs.of("order of an epoch", lambda: SamplePlan(len(train), 0).at(0))
    costs.total()
    folder.mkdir()
    for what in ("sizes from headers, buckets", "sizes from the run's folder, buckets"):
        bucketed = costs.of(what, lambda: in_buckets(train, Accelerator(cpu=True), folder))
    assert bucketed.buckets is not None
    costs.of("order of an epoch in buckets", lambda: BucketPlan(bucketed.buckets, 0, 32).at(0))


def training(name: str, data: DataConfig, folder: Path, steps: int) -> float:
    """Train the embedded base, print the memory, and return how much its last third differs from the second."""
    datasets.disable_progress_bars()
    settings = TrainSettings(
        base=BaseConfig(name="micro"), data=data, output_dir=str(folder), train_batch_size=2, max_train_steps=steps,
        validation_steps=0, checkpointing_steps=0, report_to="none", dataloader_num_workers=1,
    )  # fmt: skip
    measured: list[float] = []

    def after_step(step: int) -> bool:
        measured.append(resident())
        return False

    prepare(settings).train(after_step)
    thirds = [float(part.mean()) for part in np.array_split(measured, 3)]
    change = thirds[2] / thirds[1] - 1
    shown = ", ".join(f"{third:.0f}" for third in thirds)
    print(f"{name}, {steps} steps: {shown} MiB in each third; last against second {change:+.1%}", flush=True)
    return abs(change)


def weights(base: str) -> None:
    """Print what the fingerprints of a base's weights cost."""
    unet = random_pipeline(base, torch.device("cpu"), torch.float32).unet
    count = sum(parameter.numel() for parameter in unet.parameters())
    Costs(f"U-Net of {base}, {count / 1e6:.0f} million values").of("fingerprints", lambda: fingerprints({"unet": unet}))


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``work`` in a process of its own, and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the costs; return 0 if the memory of training is flat, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base", default="sd15", choices=("sd15", "sd21", "sdxl"), help="shape of the U-Net")
    args = parser.parse_args(argv)
    changes = []
    with tempfile.TemporaryDirectory() as folder:
        for make in (imagefolder, parquet):
            place = make(Path(folder) / make.__name__, args.rows)
            data = DataConfig(**place, resolution=SIDE, aspect_ratio_buckets=BUCKETS)  # type: ignore[arg-type]
            name = f"{make.__name__} of {args.rows:,} rows"
            alone(opening, name, data, Path(folder) / f"sizes_{make.__name__}")
            changes.append(alone(training, name, data, Path(folder) / f"out_{make.__name__}", args.steps))
    alone(weights, args.base)
    return 0 if max(changes) <= FLAT else 1


if __name__ == "__main__":
    sys.exit(main())
