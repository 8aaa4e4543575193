"""Measure caching on the embedded scenes: the rate of `localctl cache`, its disk, a second run, opening and reading.

  python -m research.benchmarks.cache  # 2,000 scenes, in this process alone
  python -m research.benchmarks.cache --num_workers 2  # by workers of Ray, their start included

Reading is in random order, as in training. Times are wall-clock, as the disk and other processes take part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from localctl.caching.cache import CacheSettings, cache
from localctl.data import DataConfig, SampleRef
from localctl.messages import no_progress_bars
from localctl.training.data import make_source
from localctl.training.encoded import with_encodings

T = TypeVar("T")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="scenes")
    parser.add_argument("--num_workers", type=int, default=0, help="as of localctl cache")
    return parser.parse_args(argv)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return the result of ``run`` and its seconds."""
    begun = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begun


def read(source: Any, order: np.ndarray) -> None:
    """Read the examples of ``source`` in this order."""
    for index in order:
        source.visit(SampleRef(int(index), 0), 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; return 0."""
    options = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, no_progress_bars():
        folder = Path(name) / "encodings"
        data = DataConfig(count=options.count, encodings_dir=str(folder))
        settings = CacheSettings(
            data=data, num_workers=options.num_workers, output_dir=str(Path(name) / "run"), validation_steps=0,
            mixed_precision="no",
        )  # fmt: skip
        first, took = timed(partial(cache, settings))
        rows = sum(first.rows.values())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        parts = " and ".join(f"{count} {kind}" for kind, count in first.rows.items())
        print(f"encoded {parts} in {took:.1f} s: {rows / took:.0f} rows/s, {size / rows / 1024:.1f} KiB per row")
        again, took = timed(partial(cache, settings))
        print(f"again: {took:.1f} s, {again.encoded} rows encoded")
        source, took = timed(lambda: with_encodings(make_source(settings, "train"), settings))
        print(f"opened and checked in {took:.2f} s")
        order = np.random.default_rng(0).permutation(options.count)
        for what in ("first", "second"):
            _, took = timed(partial(read, source, order))
            print(f"{what} epoch: {options.count / took:.0f} examples/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
