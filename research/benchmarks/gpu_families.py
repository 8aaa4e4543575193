"""What the GPU benchmark measures on transformers of published shapes: training steps of an adapter, and controls.

The transformer has random weights in bf16, the adapter is float32. Latents and prompt embeddings are random, so a step
is the model's side of the trainer's: adapter, frozen transformer, local loss, backward, AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localctl.architectures import Config
from localctl.denoisers import denoiser_of
from localctl.diffusion import add_noise, flow_sigmas, timesteps_from_uniform
from localctl.losses import local_control_loss
from localctl.settings import LossConfig
from research.benchmarks.families import Counted
from research.benchmarks.families_report import TRAINED
from research.benchmarks.family_pipelines import family_pipeline
from research.benchmarks.family_shapes import (
    Shape,
    bare_pipeline,
    latent_channels,
    made_texts,
    new_transformer,
    shape_named,
    token_adapter,
)
from research.benchmarks.gpu_parts import WARM_UP, Bench, Controls, Row
from research.benchmarks.timing import GIB, in_turns, seconds, step_figures

_VARIANTS = {"adapter": False, "adapter, gradient checkpointing": True}  # by name, whether blocks are computed again


class AdapterSteps:
    """Makes training steps of a new adapter on a frozen transformer by flow matching, one image each: ``steps(5)``."""

    def __init__(self, shape: Shape, transformer: Any, side: int, device: torch.device, checkpointing: bool) -> None:
        self._transformer, self._checkpointing = transformer, checkpointing
        pipe = bare_pipeline(shape.family, transformer)
        self._denoiser: Any = denoiser_of(pipe)
        self._adapter = token_adapter(pipe).to(device).train()
        self._optimizer = torch.optim.AdamW(self._adapter.parameters(), lr=1e-5, fused=device.type == "cuda")
        rest = partial(torch.randn, device=device, dtype=transformer.dtype)
        self._conditioning = self._denoiser.conditioning(made_texts(self._denoiser, rest), (side, side), [None])
        latent = side // pipe.vae_scale_factor
        self._latents = torch.randn(1, latent_channels(self._denoiser), latent, latent, device=device)
        self._inputs = torch.rand(1, self._adapter.channels_of_condition + 1, side, side, device=device)
        self._table = flow_sigmas(1000, 1.0).to(device)

    def __call__(self, count: int) -> None:
        """Make ``count`` steps."""
        switch = "enable_gradient_checkpointing" if self._checkpointing else "disable_gradient_checkpointing"
        getattr(self._transformer, switch)()
        for _ in range(count):
            self._loss().backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _loss(self) -> Tensor:
        latents, table, kind = self._latents, self._table, self._denoiser.prediction_type
        uniform = torch.rand(len(latents), device=latents.device, dtype=torch.float64)
        timesteps = timesteps_from_uniform(uniform, len(table), "logit_normal")
        sample = add_noise(latents, torch.randn_like(latents), timesteps, table, kind)
        with torch.autocast(latents.device.type, torch.bfloat16):
            features = [feature.to(self._transformer.dtype) for feature in self._adapter(self._inputs)]
            times = self._denoiser.times(timesteps, table)
            noisy = sample.noisy.to(self._transformer.dtype)
            output = self._denoiser.output(noisy, times, self._conditioning, features)
        return local_control_loss(sample, output, self._inputs[:, -1:], table, kind, LossConfig()).total.mean()


@dataclass
class TokenTraining:
    """Training steps on one base and size, without and with gradient checkpointing; what does not fit is left out."""

    base: str
    side: int
    rounds: int = 3
    steps: int = 3

    def rows(self, bench: Bench) -> Iterator[Row]:
        """Measure the variants in turns, and yield a row for each. Memory includes the transformer."""
        bench.free()
        shape, side, steps = shape_named(self.base, bench.tiny), bench.pixels(self.side), bench.scaled(self.steps, 1)
        cost = Counted(self.base, shape).row(side)
        transformer = new_transformer(shape.family, shape.config, bench.device, bench.dtype)
        weights, room = bench.allocated(), _room(bench.device)
        made: dict[str, AdapterSteps] = {}
        rows: dict[str, Row] = {}
        for name, checkpointing in _VARIANTS.items():
            needed = _needed(cost, checkpointing)
            if needed > room:
                yield {"skipped": f"{name}, {side} px: {needed:.0f} GiB needed of {room:.0f} GiB"}
                continue
            before = bench.allocated()
            made[name] = AdapterSteps(shape, transformer, side, bench.device, checkpointing)
            first = seconds(partial(made[name], 1), bench.device)
            made[name](bench.scaled(WARM_UP, 2) - 1)
            rows[name] = {
                "base": self.base, "side": side, "batch": 1, "variant": name,
                "gib": weights + bench.allocated() - before + bench.peak_of(partial(made[name], 1)),
                "gib_counted": needed, "first_step_seconds": first,
            }  # fmt: skip
        if not made:
            return
        runs: dict[str, Callable[[], Any]] = {name: partial(one, steps) for name, one in made.items()}
        times = in_turns(runs, bench.scaled(self.rounds, 1), bench.device, bench.deadline)
        for name, row in rows.items():  # what checkpointing repeats is no work of its own
            yield row | step_figures(name, next(iter(rows)), times, steps, 1, 1e12 * cost["step_tflop"], bench.peak)


def _needed(cost: Row, checkpointing: bool) -> float:
    """Return the GiB that a training step needs, by its count."""
    activations = cost["activations_checkpointed_gib" if checkpointing else "activations_gib"]
    return (2 * cost["parameters"] + TRAINED * cost["adapter_parameters"]) / GIB + activations


def _room(device: torch.device) -> float:
    """Return the GiB that a GPU has for tensors; no limit on a CPU."""
    return 0.95 * torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else math.inf


@dataclass
class FamilyControls(Controls):
    """The overhead of controls on a transformer, whose pipeline has small text encoders."""

    def made(self, bench: Bench) -> tuple[Any, Mapping[str, Config], Mapping[str, Any] | None]:
        """Return the pipeline, no configs, and the arguments of the base's ordinary call."""
        shape = shape_named(self.base, bench.tiny)
        pipe = family_pipeline(shape.family, shape.config, device=bench.device, dtype=bench.dtype)
        return pipe, {}, shape.call


_FLUX = "flux1_dev"
_CONTROLS = ("adapter", "bias", "dense", "spacetime")  # its ordinary call has no negative prompt to place
PARTS: Mapping[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    # As in gpu_parts. The seconds are estimates from FLOPs at 250 TFLOP/s: these parts were not run on a GPU yet.
    "flux_training_512": (TokenTraining(_FLUX, 512).rows, 45),
    "flux_controls_512": (FamilyControls(_FLUX, 512, 1, steps=5, rounds=3, names=_CONTROLS).rows, 60),
    "flux_training_1024": (TokenTraining(_FLUX, 1024).rows, 60),
    "flux_controls_1024": (FamilyControls(_FLUX, 1024, 1, steps=4, rounds=3, names=_CONTROLS).rows, 90),
    "flux_guidance_512": (FamilyControls(_FLUX, 512, 1, steps=5, rounds=2, names=("guidance",)).rows, 30),
    "flux_guidance_1024": (FamilyControls(_FLUX, 1024, 1, steps=4, rounds=2, names=("guidance",)).rows, 60),
}
