"""The 260 images that were labelled by eye for the reader: one of each of 260 held-out layouts, five methods in turn.

python tests/micro/reader_images.py FOLDER      generates them again, 000.png to 259.png (minutes on a CPU)
"""

from __future__ import annotations

import sys
from pathlib import Path

from localctl.pipelines import BaseConfig, load_pipeline, set_scheduler, with_scheduler
from localctl.sampling import generate
from research.layout_benchmark.cases import cases
from research.layout_benchmark.methods import methods

COUNT, SKIPPED = 260, 100  # layouts of `val`; the first 100 are left to the tuning of the controls
METHODS = ("guidance", "bias", "dense", "bias+guidance")  # and plain sampling
FIRST_SEED = 1000  # image i starts from the noise of seed FIRST_SEED + i


def write(folder: Path) -> None:
    """Generate what is not there yet, method by method, with the presets and 30 steps as in the layout benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(BaseConfig(name="micro"), device="cpu")
    set_scheduler(pipe, "ddim")
    pipe.set_progress_bar_config(disable=True)
    layouts = [case.layout for case in cases(SKIPPED + COUNT, "val")[SKIPPED:]]
    named = {method.name: method for method in methods(METHODS, (), "micro")}
    chosen = [named[name] for name in ("none", *METHODS)]
    for number, method in enumerate(chosen):
        mine = [i for i in range(COUNT) if i // 2 % len(chosen) == number]
        for first in range(0, len(mine), 8):
            batch = mine[first : first + 8]
            if all((folder / f"{i:03d}.png").is_file() for i in batch):
                continue
            with with_scheduler(pipe, method.sampling.scheduler):
                output = generate(
                    pipe, [layouts[i] for i in batch], method.controls, [FIRST_SEED + i for i in batch], paired=True,
                    batch_size=8, num_inference_steps=30, guidance_scale=method.sampling.guidance_scale or 2.0,
                )  # fmt: skip
            for i, image in zip(batch, output.images, strict=True):
                image.save(folder / f"{i:03d}.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
