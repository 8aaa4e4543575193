"""Measure memory and time of optimising the weights of space-time attention.

  python -m research.benchmarks.spacetime_optimization memory  # peak for 10 and for 50 steps, and their ratio
  python -m research.benchmarks.spacetime_optimization time  # a step with two objects, and a plain guided one

Memory: the peak of allocated memory on a GPU; on a CPU, the peak of the bytes of all live tensors besides the models',
without the internal buffers of libraries. Time: the median of --repeats, per step; process time on a CPU. Its parts
are the forward run with gradients and local descriptions, the objective (VAE and CLIP), and the backward pass, which
runs every step once more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from localctl.cli.program import one_sentence
from localctl.control.attach import attach
from localctl.control.spacetime import SpaceTimeAttention
from localctl.denoisers import denoiser_of
from localctl.layout import Layout, Region
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base
from localctl.sampling import image_size, initial_noise
from localctl.weight_search.differentiable import decode, sample_latents
from localctl.weight_search.objective import ClipObjective
from localctl.weight_search.weights import find_clip
from research.benchmarks.timing import peak_of

SCENE = Layout(
    "a red circle to the left of a blue square",
    regions=(Region("red circle", (0.05, 0.3, 0.45, 0.7)), Region("blue square", (0.55, 0.3, 0.95, 0.7))),
)


def new_parser() -> argparse.ArgumentParser:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("memory", "time"))
    add("--base", default="micro")
    add("--clip", default="auto", help="folder or hub id of a CLIPModel")
    add("--steps", nargs="+", type=int, default=[10, 50], help="steps of the memory runs; the time run uses the first")
    add("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="default: that of the base")
    add("--repeats", type=int, default=5)
    add("--device", default="cpu")
    add("--no_checkpointing", action="store_true", help="turn off gradient checkpointing")
    return parser


class Bench:
    """Generates an image of SCENE on one base, and optimises its weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.pipe = load_pipeline(BaseConfig(name=options.base), device=options.device)
        self.clip = find_clip(options.clip, self.pipe)
        self.size = tuple(options.size) if options.size else image_size(self.pipe, [SCENE], {})
        self.guidance_scale = resolve_base(options.base).guidance_scale
        self.noise = initial_noise(self.pipe, 0, *self.size)
        self.objective = ClipObjective(self.clip, SCENE, self.size)
        self.checkpointing = not options.no_checkpointing

    def sample(self, weights: Tensor | None, steps: int) -> Tensor:
        """Return the latents of a run with these weights of space-time attention; None: of a plain run."""
        controls = [] if weights is None else [SpaceTimeAttention(weights=weights)]
        with attach(self.pipe, SCENE, controls):
            conditioning = denoiser_of(self.pipe).condition(SCENE.prompt, self.size, self.guidance_scale, None)
            return sample_latents(self.pipe, conditioning, self.noise, steps, checkpointing=self.checkpointing)

    def loss(self, weights: Tensor, steps: int) -> Tensor:
        """Return the objective of a run with these weights."""
        return self.objective(decode(self.pipe, self.sample(weights, steps)))

    def epoch(self, steps: int) -> dict[str, float]:
        """Return the seconds of the parts of one epoch: forward, VAE and CLIP, backward."""
        weights = torch.full((steps, len(SCENE.regions)), 0.5, requires_grad=True)
        with attach(self.pipe, SCENE, SpaceTimeAttention(weights=weights)):
            conditioning = denoiser_of(self.pipe).condition(SCENE.prompt, self.size, self.guidance_scale, None)
            start = self.now()
            latents = sample_latents(self.pipe, conditioning, self.noise, steps, checkpointing=self.checkpointing)
            sampled = self.now()
            loss = self.objective(decode(self.pipe, latents))
            seen = self.now()
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()
        return {"forward": sampled - start, "VAE and CLIP": seen - sampled, "backward": self.now() - seen}

    def now(self) -> float:
        """Return the time in seconds: wall-clock time on a GPU, process time on a CPU."""
        if self.pipe.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def memory(bench: Bench, steps: Sequence[int]) -> None:
    """Print the peak of one epoch for each number of steps, and the ratio of the last to the first."""
    peaks = []
    for count in steps:
        peaks.append(peak_of(partial(bench.epoch, count), bench.pipe.device))
        print(f"{count} steps: peak {peaks[-1]:.1f} MiB beyond the models")
    print(f"ratio {steps[-1]} / {steps[0]} steps: {peaks[-1] / peaks[0]:.3f}")


def timing(bench: Bench, steps: int, repeats: int) -> None:
    """Print the time per step of a plain guided run and of the parts of an epoch, and their ratios."""
    constant = torch.full((steps, len(SCENE.regions)), 0.5)
    rows: dict[str, list[float]] = {}
    for index in range(repeats + 1):
        parts = {}
        for name, weights in (("plain guided step", None), ("with local descriptions", constant)):
            start = bench.now()
            with torch.no_grad():
                bench.sample(weights, steps)
            parts[name] = bench.now() - start
        epoch = bench.epoch(steps)
        parts |= {f"optimising: {name}": seconds for name, seconds in epoch.items()}
        parts["optimising: all"] = sum(epoch.values())
        for name, seconds in parts.items() if index else ():  # the first is a warm-up
            rows.setdefault(name, []).append(seconds / steps)
    plain = statistics.median(rows["plain guided step"])
    for name, values in rows.items():
        print(f"{name}: {1000 * statistics.median(values):.1f} ms per step, {statistics.median(values) / plain:.2f} x")


@one_sentence("spacetime_optimization")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 2 after a user's error, with one sentence on stderr."""
    options = new_parser().parse_args(argv)
    bench = Bench(options)
    if options.what == "memory":
        memory(bench, options.steps)
    else:
        timing(bench, options.steps[0], options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
