"""Measure what each control costs while sampling: time over plain runs, which take turns with it, and peak memory.

  python -m research.benchmarks.sample  # the embedded base, default size, 2 regions
  python -m research.benchmarks.sample --size 512 --batch 1 --controls dense
  python -m research.benchmarks.sample --regions 16 --controls negative spacetime
  python -m research.benchmarks.sample --base sd15 --steps 2 --batch 1 --controls bias  # 512 px, random weights
  python -m research.benchmarks.sample --base flux --batch 1 --size 256  # a tiny FLUX, random weights

Whole runs with guidance are timed, without decoding. Every control is active in all steps, but for layout guidance: it
makes all of its moves in the first fifth of the steps. On a CPU, time is process time over all cores, which other
programs hardly disturb, and memory the bytes of all live tensors but the models'; on a GPU, wall-clock time and
allocated memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from localctl.adapter import LocalAdapter
from localctl.architectures import BaseShape, Config, read_shape
from localctl.bases import BaseConfig
from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.control.image_controls import LocalAdapterControl
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.presets import preset
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.denoisers import denoiser_of
from localctl.denoisers.transformer import Transformer
from localctl.layout import Layout, Region
from localctl.pipelines import load_pipeline, resolve_base
from localctl.sampling import generate
from localctl.training.adapter_plan import plan_adapter
from localctl.training.settings import TrainSettings
from research.benchmarks.family_pipelines import family_pipeline, small_sd3
from research.benchmarks.family_shapes import CLASSES, SHAPES, token_adapter
from research.benchmarks.shapes import random_pipeline, shape_of
from research.benchmarks.timing import Deadline, Spread, in_turns, peak_of, ratios

Row = dict[str, Any]
NONE = "none"
MAKE: Mapping[str, Callable[[str], Control]] = {  # by the name of a base; the adapter is made with its pipeline
    "bias": lambda base: RegionBias(),
    "dense": lambda base: DenseModulation(end=1.0),
    "negative": lambda base: NegativePrompts(),
    "spacetime": lambda base: SpaceTimeAttention(),
    "guidance": lambda base: LayoutGuidance(**{**preset("guidance", base), "threshold": 0.0, "start": 0.0, "end": 0.2}),
}
CONTROLS = ("adapter", *MAKE)
SMALL_SD3 = "small_sd3"  # 5.4 million parameters, in the place of the embedded base's U-Net
BASES = ("micro", "sd15", "sd21", "sdxl", *CLASSES, SMALL_SD3)
_COLORS, _SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle", "star")


def scene(regions: int) -> Layout:
    """Return a layout of up to 16 objects in a grid, each with a negative prompt."""
    if not 1 <= regions <= len(_COLORS) * len(_SHAPES):
        raise ValueError(f"There are {regions} regions; choose 1 to {len(_COLORS) * len(_SHAPES)}.")
    names = [f"{color} {shape}" for shape in _SHAPES for color in _COLORS][:regions]
    side = next(count for count in range(1, 5) if count**2 >= regions)
    size = 1 / side
    places = [(size * (index % side), size * (index // side)) for index in range(regions)]
    return Layout(
        " and ".join(names[:2]) + " ".join(["", *names[2:]]),
        regions=tuple(
            Region(name, (x + 0.1 * size, y + 0.1 * size, x + 0.9 * size, y + 0.9 * size), negative_prompt="a blur")
            for name, (x, y) in zip(names, places, strict=True)
        ),
    )


def adapter_control(pipe: Any, base: str, side: int, parts: Mapping[str, Config]) -> Control:
    """Return a control by a new adapter that fits ``base``: lines for a condition, inside a mask in the middle."""
    denoiser = denoiser_of(pipe)
    if isinstance(denoiser, Transformer):
        adapter = token_adapter(pipe)
    else:
        adapter = LocalAdapter(**plan_adapter(TrainSettings(base=BaseConfig(name=base)), BaseShape(parts)).options)
    adapter.eval().requires_grad_(False)
    nn.Module.to(adapter, denoiser.module.device, denoiser.module.dtype)  # ModelMixin.to would warn
    condition, mask = torch.zeros(adapter.channels_of_condition, side, side), torch.zeros(1, side, side)
    condition[:, ::8], mask[:, side // 4 : -side // 4] = 1, 1
    return LocalAdapterControl(adapter, condition, mask)


def make_controls(
    names: Sequence[str], pipe: Any, base: str, side: int, parts: Mapping[str, Config]
) -> dict[str, Sequence[Control]]:
    """Return the controls of these names, and none for the plain run, which is the first. parts: the base's configs."""
    made: dict[str, Sequence[Control]] = {NONE: ()}
    for name in names:
        made[name] = [adapter_control(pipe, base, side, parts) if name == "adapter" else MAKE[name](base)]
    return made


class Runs:
    """Runs of a pipeline, with any controls, on one layout and size; ``steps`` and ``batch`` are those of each run.

    call: arguments of the pipeline for its guidance; None: the scale of ``base``.
    """

    def __init__(
        self,
        pipe: Any,
        base: str,
        side: int,
        *,
        batch: int,
        steps: int,
        regions: int = 2,
        call: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.steps = pipe, steps
        self._layouts, self._seeds = [scene(regions)] * batch, list(range(batch))
        self._arguments: dict[str, Any] = {
            "height": side,
            "width": side,
            "num_inference_steps": steps,
            "batch_size": batch,
        }
        guidance = {"guidance_scale": resolve_base(base).guidance_scale} if call is None else call
        self._arguments |= {**guidance, "output_type": "latent"}

    def __call__(self, controls: Sequence[Control]) -> None:
        """Make one run."""
        generate(self.pipe, self._layouts, controls, self._seeds, paired=True, **self._arguments)

    def overheads(
        self, controls: Mapping[str, Sequence[Control]], rounds: int, deadline: Deadline | None = None
    ) -> Iterator[Row]:
        """Measure each of ``controls`` in turns with the first one, the plain run; yield a row for each."""
        device = denoiser_of(self.pipe).module.device
        runs = {name: partial(self, used) for name, used in controls.items()}
        peaks = {name: peak_of(run, device) for name, run in runs.items()}  # also the warm-up
        times = in_turns(runs, rounds, device, deadline)
        plain = next(iter(runs))
        for name in runs:
            over = ratios(times, plain, name)  # time of the control / time of the plain run
            yield {
                "control": name, "ms_per_step": 1e3 * Spread.of(times[name]).median / self.steps,
                "overhead": over.median - 1, "overhead_low": over.low - 1, "overhead_high": over.high - 1,
                "peak_mib": peaks[name], "rounds": len(times[name]), "steps": self.steps,
            }  # fmt: skip


def load(base: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Mapping[str, Config]]:
    """Return a pipeline, and the configs of its parts for a U-Net; a transformer's adapter needs none."""
    if base == "micro":
        pipe: Any = load_pipeline("micro", dtype, device)
        pipe.set_progress_bar_config(disable=True)
        return pipe, read_shape(BaseConfig()).parts
    if base == SMALL_SD3:
        return small_sd3(device, dtype), {}
    if base in CLASSES:
        return family_pipeline(base, device=device, dtype=dtype), {}
    return random_pipeline(base, device, dtype), shape_of(base)


def call_of(base: str) -> Mapping[str, Any] | None:
    """Return the arguments for the guidance of a family of transformers; None for other bases."""
    if base == SMALL_SD3:
        return {"guidance_scale": 4.5, "max_sequence_length": 0}  # it has no third text encoder
    return next((shape.call for shape in SHAPES.values() if shape.family == base), None)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", choices=BASES, default="micro", help="families of transformers are tiny")
    add("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    add("--regions", type=int, default=2, help="1 to 16")
    add("--steps", type=int, default=10)
    add("--batch", type=int, default=4, help="images generated at once")
    add("--rounds", type=int, default=5)
    add("--size", type=int, help="pixels on a side; default: that of the base")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per control; return 0."""
    options = parse(argv)
    pipe, parts = load(options.base, torch.device(options.device), getattr(torch, options.dtype))
    side = options.size or denoiser_of(pipe).own_size[0]
    runs = Runs(
        pipe,
        options.base,
        side,
        batch=options.batch,
        steps=options.steps,
        regions=options.regions,
        call=call_of(options.base),
    )
    print(
        f"{options.base}, {side} px, {options.regions} regions, {options.steps} steps, batch {options.batch}, "
        f"{options.device} {options.dtype}, {options.rounds} rounds"
    )
    controls = make_controls(options.controls, pipe, options.base, side, parts)
    for row in runs.overheads(controls, options.rounds):
        print(
            f"{row['control']}: {row['ms_per_step']:.0f} ms per step, {row['overhead']:+.1%} over plain "
            f"({row['overhead_low']:+.1%} to {row['overhead_high']:+.1%}), peak {row['peak_mib']:.0f} MiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
