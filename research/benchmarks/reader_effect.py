"""What another reader of micro scenes makes of the layout benchmark: images of it generated again and read again.

  python research/benchmarks/reader_effect.py FOLDER [--layouts 50] [--methods bias guidance]

Beside the figures of the same layouts and seeds that are committed in docs/layout_benchmark. FOLDER keeps the images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localctl.cli.sample_regions import named
from localctl.images import load_image
from localctl.metrics.bootstrap import bootstrap
from localctl.pipelines import load_pipeline, resolve_base, set_scheduler, with_scheduler
from localctl.sampling import generate
from research.layout_benchmark.cases import COLUMNS, Case, cases, read
from research.layout_benchmark.methods import Method, methods

COMMITTED = Path(__file__).parents[2] / "docs" / "layout_benchmark"
SEEDS = (0, 1)
SHOWN = ("right", "accuracy", "iou", "present", "binding", "color_accuracy")


def images(pipe: Any, method: Method, chosen: Sequence[Case], folder: Path) -> list[np.ndarray]:
    """Layout by layout, each with every seed; those that are not there yet are generated."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(case, seed, folder / f"{case.id}_seed{seed}.png") for case in chosen for seed in SEEDS]
    missing = [entry for entry in wanted if not entry[2].is_file()]
    scale = method.sampling.guidance_scale or resolve_base("micro").guidance_scale
    for first in range(0, len(missing), 8):
        batch = missing[first : first + 8]
        with with_scheduler(pipe, method.sampling.scheduler):
            output = generate(
                pipe, [case.layout for case, _, _ in batch], method.controls, [seed for _, seed, _ in batch],
                paired=True, batch_size=8, num_inference_steps=30, guidance_scale=scale,
            )  # fmt: skip
        for (_, _, path), image in zip(batch, output.images, strict=True):
            image.save(path)
    return [np.asarray(load_image(path)) for _, _, path in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layouts", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=["guidance", "bias"])
    args = parser.parse_args()
    pipe = load_pipeline("micro")
    set_scheduler(pipe, "ddim")
    pipe.set_progress_bar_config(disable=True)
    chosen = cases(args.layouts, "test")
    print(f"| | read | {' | '.join(SHOWN)} |\n|---|---|{'---|' * len(SHOWN)}")
    for method in methods(args.methods, (), "micro"):
        found = images(pipe, method, chosen, args.folder / named(method.name))
        shown = [case for case in chosen for _ in SEEDS]
        now = np.array([read(image, case) for image, case in zip(found, shown, strict=True)])
        committed = json.loads((COMMITTED / f"{named(method.name)}.json").read_text())["samples"]
        before = np.array(committed[: len(now)], dtype=float)  # None becomes NaN
        for name, values in (("as committed", before), ("now", now)):
            layouts = [values[:, COLUMNS.index(column)].reshape(-1, len(SEEDS)) for column in SHOWN]
            defined = [rows[~np.isnan(rows).all(axis=1)] for rows in layouts]
            cells = [str(bootstrap(np.nanmean(rows, axis=1))) for rows in defined]
            print(f"| {method.name} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
