"""Measure the time of region controls relative to plain sampling: runs alternate, and medians are printed.

  python -m research.benchmarks.region_cost  # the embedded base, default windows, whole runs
  python -m research.benchmarks.region_cost --base sd15 --steps 2 --batch 1  # SD1.5, 512 px, random weights

For RegionBias and DenseModulation: a whole run with their default windows, relative to a plain one. For
LayoutGuidance: the time of a guided step in plain steps; its threshold is 0 here, so that every step makes all its
moves. On the CPU, this is process time over all cores, which other programs hardly disturb. Images are not decoded.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch

from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.region_bias import RegionBias
from localctl.layout import Layout, Region
from localctl.pipelines import load_pipeline, resolve_base
from localctl.sampling import generate
from research.benchmarks.shapes import random_pipeline
from research.layout_benchmark.cost import seconds

SCENE = Layout(
    "a red circle and a blue square on a white background",
    regions=(Region("red circle", (0.05, 0.1, 0.45, 0.5)), Region("blue square", (0.55, 0.5, 0.95, 0.9))),
)
METHODS: dict[str, Control] = {
    "bias": RegionBias(),
    "dense": DenseModulation(),
    "guidance": LayoutGuidance(threshold=0.0),
}
GOALS = {"micro": {"bias": 0.15, "dense": 0.40}, "sd15": {"bias": 0.08}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", choices=("micro", "sd15", "sd21", "sdxl"), default="micro")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--steps", type=int, default=10)
    add("--batch", type=int, default=4, help="images generated at once")
    add("--repeats", type=int, default=5)
    add("--size", type=int, help="pixels on a side; default: that of the base")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per method; return 0."""
    options = parse(argv)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.base == "micro":
        pipe = load_pipeline("micro", dtype, device)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = random_pipeline(options.base, device, dtype)
    size = options.size or pipe.unet.config.sample_size * 8
    arguments = {
        "height": size,
        "width": size,
        "num_inference_steps": options.steps,
        "guidance_scale": resolve_base(options.base).guidance_scale,
        "output_type": "latent",
        "batch_size": options.batch,
    }

    def run(controls: Sequence[Control]) -> None:
        generate(pipe, [SCENE] * options.batch, controls, list(range(options.batch)), paired=True, **arguments)

    chosen = {"none": (), **{name: (METHODS[name],) for name in options.methods}}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for repeat in range(options.repeats + 1):
        for name, controls in chosen.items():
            took = seconds(partial(run, controls), device)
            if repeat:  # the first round warms up
                times[name].append(took)
    print(f"{options.base}, {size} px, {options.steps} steps, batch {options.batch}, {options.device} {options.dtype}")
    print(f"plain: {statistics.median(times['none']):.3f} s, median of {options.repeats}")
    for name in options.methods:
        report(name, times, options)
    return 0


def report(name: str, times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print the line of a method."""
    ratios = sorted(took / plain for took, plain in zip(times[name], times["none"], strict=True))
    over = statistics.median(ratios) - 1
    line = f"{name}: {over:+.1%} over plain (from {ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%})"
    goal = GOALS.get(options.base, {}).get(name)
    if goal is not None:
        line += f", goal {goal:.0%}: {'met' if over <= goal else 'MISSED'}"
    control = METHODS[name]
    if isinstance(control, LayoutGuidance):
        guided = math.ceil(control.end * options.steps)  # steps 0, 1, ... with step / steps < end
        per_step = over * options.steps / guided
        line += f"; a guided step of {control.iterations} moves takes {1 + per_step:.1f} plain steps"
    print(line)


if __name__ == "__main__":
    sys.exit(main())
