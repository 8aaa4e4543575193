"""Measure what a new version of the micro scene reader changes in the layout benchmark: images are generated anew.

  python -m research.benchmarks.reader_effect FOLDER [--layouts 50] [--methods bias guidance]

The figures are printed beside the committed ones of the same layouts and seeds. FOLDER stores the images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from localctl.jobs.variants import file_label
from localctl.pipelines import load_pipeline, resolve_base, set_scheduler, with_scheduler
from research.flags import RESULTS
from research.harness import as_table, generate_cases
from research.layout_benchmark.cases import COLUMNS, Case, cases, read
from research.layout_benchmark.methods import Method, methods
from research.page import interval

COMMITTED = RESULTS / "layout_benchmark"
SEEDS = (0, 1)
SHOWN = ("right", "accuracy", "iou", "present", "binding", "color_accuracy")


def images(pipe: Any, method: Method, chosen: Sequence[Case], folder: Path) -> list[np.ndarray]:
    """Return the images of the cases; missing ones are generated."""
    files = [folder / f"{case.id}_seed{case.seed}.png" for case in chosen]
    scale = method.sampling.guidance_scale or resolve_base("micro").guidance_scale
    options: dict[str, Any] = {"num_inference_steps": 30, "guidance_scale": scale}
    with with_scheduler(pipe, method.sampling.scheduler):
        return generate_cases(pipe, chosen, lambda _: method.controls, 8, method.name, files, **options)


def main() -> None:
    """Print the figures, as committed and now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layouts", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=["guidance", "bias"])
    args = parser.parse_args()
    pipe = load_pipeline("micro")
    set_scheduler(pipe, "ddim")
    pipe.set_progress_bar_config(disable=True)
    chosen = [replace(case, seed=seed) for case in cases(args.layouts, "test") for seed in SEEDS]
    print(f"| | measured | {' | '.join(SHOWN)} |\n|---|---|{'---|' * len(SHOWN)}")
    for method in methods(args.methods, (), "micro"):
        found = images(pipe, method, chosen, args.folder / file_label(method.name))
        now = np.array([read(image, case) for image, case in zip(found, chosen, strict=True)])
        committed = json.loads((COMMITTED / f"{file_label(method.name)}.json").read_text())["samples"]
        before = as_table(committed[: len(now)])
        for name, values in (("as committed", before), ("now", now)):
            layouts = [values[:, COLUMNS.index(column)].reshape(-1, len(SEEDS)) for column in SHOWN]
            cells = [str(interval(rows)) for rows in layouts]
            print(f"| {method.name} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
