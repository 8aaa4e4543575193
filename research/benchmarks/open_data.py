"""Measure what a large dataset costs: seconds and memory until the first step, and memory while training.

  python -m research.benchmarks.open_data [--rows 500000] [--steps 300]

Rows of metadata.jsonl and of parquet, which share 1,000 images, are written to a temporary folder. Each part runs in a
process of its own. Memory is the resident set without mapped files, which the system drops when it needs space: its
growth above the imports, and while training its mean in each third of the steps. The exit status is 1 if the last third
differs from the second by more than 3 %.
"""

from __future__ import annotations

import argparse
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
from accelerate import Accelerator

from localctl.conditions import ConditionConfig
from localctl.data import BucketPlan, DataConfig, FileSource, SamplePlan, open_files
from localctl.data.files import part_of
from localctl.pipelines import BaseConfig
from localctl.training.data import in_buckets
from localctl.training.loop import prepare
from localctl.training.settings import TrainSettings
from localctl.training.summary import remarks
from research.benchmarks.fingerprint import imagefolder, parquet

MIB = 2**20
FLAT = 0.03
SIDE = 64
BUCKETS = "64,64;64,96;96,64"


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


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``work`` in a process of its own, and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the costs; return 0 if the memory of training is flat, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    changes = []
    with tempfile.TemporaryDirectory() as folder:
        for make in (imagefolder, parquet):
            made = make(Path(folder) / make.__name__, args.rows)
            data = DataConfig(
                name=made.name, path=made.path, cache_dir=made.cache_dir, resolution=SIDE, aspect_ratio_buckets=BUCKETS
            )
            name = f"{make.__name__} of {args.rows:,} rows"
            alone(opening, name, data, Path(folder) / f"sizes_{make.__name__}")
            changes.append(alone(training, name, data, Path(folder) / f"out_{make.__name__}", args.steps))
    return 0 if max(changes) <= FLAT else 1


if __name__ == "__main__":
    sys.exit(main())
