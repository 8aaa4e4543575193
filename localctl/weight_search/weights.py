"""Weights of space-time attention, optimised per object and step for one image (arXiv 2304.03869).

``optimize_weights`` gives the weights, the image is an ordinary run with them; ``generate_optimized`` does both.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from localctl.control.attach import attach
from localctl.control.base import Control
from localctl.control.compatible import check_gradients, without_gradients
from localctl.control.serialization import Serializable
from localctl.control.spacetime import SpaceTimeAttention, SpaceTimeSettings, description
from localctl.denoisers import denoiser_of
from localctl.diffusion import check_schedule
from localctl.layout import Layout, as_layouts
from localctl.metrics.clip import Clip
from localctl.pipelines import set_scheduler
from localctl.sampling import (
    GenerateOutput,
    Layouts,
    Sampling,
    generate,
    image_size,
    initial_noise,
    resolve_sampling,
    scheduled,
)
from localctl.weight_search.differentiable import decode, is_differentiable, sample_latents
from localctl.weight_search.objective import ClipObjective

DEFAULT_CLIP = "openai/clip-vit-base-patch32"  # the published one


@dataclass(frozen=True)
class OptimizedSpaceTime(SpaceTimeSettings, Serializable):
    """The settings of space-time attention whose weights :func:`generate_optimized` finds for each image; those of
    :class:`~localctl.control.spacetime.SpaceTimeSettings` are where it starts from. No control by itself.

    Args:
        epochs, learning_rate: of Adam; 3 and 0.005 as published. A step of Adam moves a weight by about the rate.
        region_factor: what the regions' CLIP losses count beside the image's.
        normalise_pixels: show the CLIP pixels as it was trained on; False: in [0, 1], as the published code does.
        last_steps: gradients through so many of the last steps only; 0 = through all.
        clip: folder or hub id of a CLIPModel; ``auto``: the one in the base's folder, if any, else the published one.

    Raises:
        ValueError: a number out of range, or as for :class:`~localctl.control.spacetime.SpaceTimeSettings`.
    """

    epochs: int = 3
    learning_rate: float = 0.005
    region_factor: float = 5.0
    normalise_pixels: bool = True
    last_steps: int = 0
    clip: str = "auto"

    not_attached: ClassVar[str] = "it has no weights yet; use generate_optimized"  # what attach says of it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.last_steps < 0:
            raise ValueError(
                f"An optimisation needs at least 1 epoch and 0 last_steps or more, not {self.epochs} and "
                f"{self.last_steps}."
            )
        if not (0 < self.learning_rate < math.inf and 0 <= self.region_factor < math.inf):
            raise ValueError(
                "The learning_rate must be above 0 and the region_factor at least 0, not "
                f"{self.learning_rate} and {self.region_factor}."
            )

    def with_weights(self, weights: Tensor) -> SpaceTimeAttention:
        """Return the control of these settings and ``weights`` (steps, regions)."""
        settings = {field.name: getattr(self, field.name) for field in fields(SpaceTimeSettings)}
        return SpaceTimeAttention(**settings, weights=weights)


@dataclass(frozen=True)
class OptimizedWeights:
    """weights: (steps, regions) float32 on the CPU, for ``SpaceTimeAttention(weights=...)`` and as many steps; losses:
    the objective before each epoch's step."""

    weights: Tensor
    losses: tuple[float, ...]


def optimize_weights(
    pipe: DiffusionPipeline,
    layout: Layout,
    clip: Clip,
    control: OptimizedSpaceTime | None = None,
    *,
    seed: int = 0,
    controls: Sequence[Control] = (),
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    checkpointing: bool = True,
    progress: bool = True,
) -> OptimizedWeights:
    """Return the weights for the image that ``generate`` makes of ``layout`` with ``seed``, by gradients through
    sampling.

    Samples with the pipeline's scheduler if it is DDIM or PNDM (PLMS), else with DDIM; the weights fit any scheduler.

    Args:
        clip: looks at the image and its regions (see :class:`~localctl.weight_search.objective.ClipObjective`).
        control: where to start and how to go on; None = the defaults.
        controls: others that act together with it; none that moves latents.
        checkpointing: the memory of one step, at the price of a second run of each; without, that of all steps.

    Raises:
        ValueError: no region has a description; a control moves latents; weights let no gradients pass; a schedule or a
            loss has no finite values; or as for ``attach``.
    """
    control = control or OptimizedSpaceTime()
    denoiser = denoiser_of(pipe)
    if num_inference_steps < 1:
        raise ValueError(f"The number of steps must be at least 1, not {num_inference_steps}.")
    if not any(description(region) for region in layout.regions):
        raise ValueError("No region of the layout has a phrase or a prompt, so there are no weights; give it one.")
    check_gradients(denoiser, "An optimisation of weights")
    height, width = image_size(pipe, [layout], {})
    objective = ClipObjective(clip, layout, (height, width), control.region_factor, control.normalise_pixels)
    weights = control.step_weights(layout, num_inference_steps).requires_grad_()
    adam = torch.optim.Adam([weights], lr=control.learning_rate)
    noise = initial_noise(pipe, seed, height, width)
    losses = []
    with _sampling(pipe), attach(pipe, layout, [control.with_weights(weights), *controls]) as attached:
        if any(bound.moves_latents for bound in attached.bound):
            raise ValueError("Weights cannot be optimised beside controls that move latents; leave LayoutGuidance out.")
        conditioning = denoiser.condition(layout.prompt, (height, width), guidance_scale, negative_prompt)
        pipe.scheduler.set_timesteps(num_inference_steps)
        visited = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps.long().cpu()]
        check_schedule(visited, denoiser.prediction_type)
        total = control.epochs * len(pipe.scheduler.timesteps)
        with tqdm(total=total, desc="optimising weights", unit="step", disable=not progress) as bar:
            options: dict[str, Any] = {"last_steps": control.last_steps or None, "checkpointing": checkpointing}
            for _ in range(control.epochs):
                latents = sample_latents(
                    pipe, conditioning, noise, num_inference_steps, **options, after_call=bar.update
                )
                losses.append(_step(adam, objective(decode(pipe, latents)), weights, control.mix == "convex"))
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return OptimizedWeights(weights.detach().clone(), tuple(losses))


def _step(adam: torch.optim.Optimizer, loss: Tensor, weights: Tensor, convex: bool) -> float:
    """One step down the gradient of ``loss``, back into [0, 1] for a convex mix; the loss."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError("The loss of the optimisation is not finite; use float32 or bfloat16.")
    adam.zero_grad()
    # One thread, on a GPU too: steps that are run again must be seen by the controls as before.
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()
    adam.step()
    if convex:
        with torch.no_grad():
            weights.clamp_(0, 1)
    return value


@contextmanager
def _sampling(pipe: DiffusionPipeline) -> Iterator[None]:
    """Yield a scheduler of our own on the pipeline, and gradients for nothing but what wants them; undone at the end.

    The denoiser's own gradient checkpointing would run its layers again when the controls have left them, so it is off.
    """
    module: Any = denoiser_of(pipe).module
    own, checkpointing = pipe.scheduler, module.is_gradient_checkpointing
    try:
        module.disable_gradient_checkpointing()
        if is_differentiable(own):
            pipe.scheduler = copy.deepcopy(own)
        else:
            set_scheduler(pipe, "ddim")
        with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
            for frozen in (module, pipe.vae):
                stack.enter_context(without_gradients(frozen))
            yield
    finally:
        pipe.scheduler = own
        if checkpointing:
            module.enable_gradient_checkpointing()


def find_clip(name: str, pipe: DiffusionPipeline) -> Clip:
    """Return the CLIP meant by :class:`OptimizedSpaceTime`'s ``clip``, on the pipeline's device. ValueError when not
    found."""
    return clip_beside(name, str(pipe.config.get("_name_or_path", "")), pipe.device)


def clip_beside(name: str, base: str, device: torch.device | str = "cpu") -> Clip:
    """As :func:`find_clip`, for a base, by its folder or hub id, that need not be loaded yet."""
    if name == "auto":
        own = Path(base, "clip")
        name = str(own) if (own / "config.json").is_file() else DEFAULT_CLIP
    return Clip(name, device)


def generate_optimized(
    pipe: DiffusionPipeline,
    layout: Layouts,
    controls: Sequence[Control | OptimizedSpaceTime],
    seeds: int | Sequence[int] | None = None,
    *,
    sampling: Sampling | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    progress: bool = True,
    clip: Clip | None = None,
) -> GenerateOutput:
    """As :func:`~localctl.sampling.generate`, with the weights of the one :class:`OptimizedSpaceTime` among
    ``controls`` found anew for each layout and seed; ``sampling`` and what is said beside it as there.

    clip: the one that the control names, where it is loaded already. ValueError without exactly one such control, for
    settings of sampling that an optimisation does not know, or as for :func:`optimize_weights`.
    """
    found = [control for control in controls if isinstance(control, OptimizedSpaceTime)]
    if len(found) != 1:
        raise ValueError(f"There are {len(found)} controls to optimise; give one OptimizedSpaceTime.")
    optimized = found[0]
    others = [control for control in controls if not isinstance(control, OptimizedSpaceTime)]
    clip = clip or find_clip(optimized.clip, pipe)
    said = Sampling(None, guidance_scale, num_inference_steps, seeds=seeds)
    how = resolve_sampling(pipe, said, sampling).over(Sampling(None, 7.5, 50))  # the pipelines' own defaults
    for name in ("guidance_rescale", "clip_skip", "eta"):
        if getattr(how, name):
            raise ValueError(f"{name} does not go together with OptimizedSpaceTime; use SpaceTimeAttention.")
    options: dict[str, Any] = {
        "num_inference_steps": how.num_inference_steps,
        "guidance_scale": how.guidance_scale,
        "negative_prompt": negative_prompt,
    }
    outputs = []
    with scheduled(pipe, how):
        for item, seed in itertools.product(as_layouts(layout), how.seeds):
            weights = optimize_weights(
                pipe, item, clip, optimized, seed=seed, controls=others, progress=progress, **options
            ).weights
            final = [one.with_weights(weights) if isinstance(one, OptimizedSpaceTime) else one for one in controls]
            outputs.append(generate(pipe, item, final, seed, **options))
    return GenerateOutput(
        [image for output in outputs for image in output.images],
        tuple(seed for output in outputs for seed in output.seeds),
        tuple(item for output in outputs for item in output.layouts),
    )
