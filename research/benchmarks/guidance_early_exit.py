"""Compare a guidance pass with early exit to a full one, on SDXL's architecture with random weights.

  python -m research.benchmarks.guidance_early_exit --size 256  # CPU, ~11 GB
  python -m research.benchmarks.guidance_early_exit --size 1024 --device cuda --dtype float16  # GPU

A pass is one run of the U-Net on the prompt's row, up to the last guided layer, and the gradient of the energy. Its
peak is that of its activations: allocated memory on a GPU, the bytes of all live tensors of the pass on the CPU. Passes
alternate; times are medians of --repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localctl.control.base import BoundControl, CallContext, Control, RunDenoiser
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.presets import PRESETS
from localctl.sampling import generate
from research.benchmarks.sample import scene
from research.benchmarks.shapes import random_pipeline
from research.benchmarks.timing import peak_of
from research.layout_benchmark.cost import seconds


class Passes(Control):
    """Runs passes with and without early exit alternately, and records seconds and peaks; does not move latents."""

    def __init__(self, settings: Mapping[str, Any], repeats: int) -> None:
        self.settings, self.repeats = settings, repeats
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.peaks: dict[bool, float] = {}

    def bind(self, pipe: Any, layouts: Any) -> BoundControl:
        passes = {
            early: LayoutGuidance(**self.settings, early_exit=early).bind(pipe, layouts) for early in (True, False)
        }
        bound, times, peaks, repeats = BoundControl(), self.times, self.peaks, self.repeats
        bound.moves_latents = True

        def shift_latents(context: CallContext, latents: Tensor, run: RunDenoiser) -> None:
            def one(early: bool) -> None:
                assert passes[early].shift_latents(context, latents, run) is not None

            for early in passes:
                peaks[early] = peak_of(partial(one, early), latents.device)
            for _ in range(repeats):
                for early in passes:
                    times[early].append(seconds(partial(one, early), latents.device))

        bound.shift_latents = shift_latents  # type: ignore[method-assign]
        return bound


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", choices=("sd15", "sd21", "sdxl"), default="sdxl")
    add("--size", type=int, default=256, help="pixels on a side")
    add("--repeats", type=int, default=3)
    add("--checkpointing", action="store_true", help="gradient checkpointing in the U-Net")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print times, peaks and their ratios; return 0."""
    options = parse(argv)
    device = torch.device(options.device)
    pipe = random_pipeline(options.base, device, getattr(torch, options.dtype))
    if options.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    settings = {**PRESETS[options.base]["guidance"], "iterations": 1, "threshold": 0.0, "start": 0.0, "end": 1.0}
    control = Passes(settings, options.repeats)
    size = {"height": options.size, "width": options.size}
    generate(pipe, scene(2), control, 0, num_inference_steps=1, guidance_scale=5.0, output_type="latent", **size)
    early, full = (statistics.median(control.times[key]) for key in (True, False))
    small, large = (control.peaks[key] for key in (True, False))
    weights = sum(parameter.nbytes for parameter in pipe.unet.parameters()) / 2**30
    kind = " with checkpointing" if options.checkpointing else ""
    print(f"{options.base}, {options.size} px, {options.device} {options.dtype}{kind}, U-Net {weights:.1f} GiB")
    print(f"seconds of a pass: {early:.2f} with early exit, {full:.2f} in full: {early / full:.2f} times")
    print(f"peak of activations: {small:.0f} MiB with early exit, {large:.0f} in full: {small / large:.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
