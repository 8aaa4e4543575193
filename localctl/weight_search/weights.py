"""Weights of space-time attention, optimised per object and step for one image (arXiv 2304.03869).

``optimize_weights`` returns the weights, with which the image is then generated as usual; ``generate_optimized`` does
both.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
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
from localctl.previews import OnStep, SamplingStep
from localctl.prompt_weights import weighted_prompts
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
    """Settings of space-time attention whose weights :func:`generate_optimized` optimises for each image.

    The weights start from the settings of :class:`~localctl.control.spacetime.SpaceTimeSettings`. This is not a control
    and cannot be attached.

    Args:
        epochs, learning_rate: of Adam; 3 and 0.005 as published. A step of Adam moves a weight by about the rate.
        region_factor: weight of the regions' CLIP losses relative to the image's.
        normalise_pixels: normalise pixels as in CLIP's training; False: pixels in [0, 1], as the published code does.
        last_steps: backpropagate through this many of the last steps only; 0 = through all.
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

    not_attached: ClassVar[str] = "it has no weights yet; use generate_optimized"  # for the error of attach

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.last_steps < 0:
            raise ValueError(
                f"An optimisation needs at least 1 epoch and at least 0 last_steps, not {self.epochs} and "
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
    """The result of :func:`optimize_weights`.

    weights: (steps, regions) float32 on the CPU, for ``SpaceTimeAttention(weights=...)`` with as many steps. losses:
    the objective before each epoch's step.
    """

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
    on_step: OnStep | None = None,
) -> OptimizedWeights:
    """Optimise the weights for the image that ``generate`` makes from ``layout`` and ``seed``.

    Gradients pass through the whole sampling, with the pipeline's scheduler if it is DDIM or PNDM (PLMS), else with
    DDIM. The weights can then be used with any scheduler and as many steps.

    Args:
        clip: for the :class:`~localctl.weight_search.objective.ClipObjective`.
        control: the settings of the start and of the optimisation; None = the defaults.
        controls: further controls, none of which may move latents.
        checkpointing: use the memory of one step instead of all; each step then runs twice.
        on_step: called with a :class:`~localctl.previews.SamplingStep` without latents after every step of every epoch.

    Raises:
        ValueError: no region has a description; a control moves latents; weights let no gradients pass; the schedule
            leaves no signal for epsilon prediction; the loss is not finite; or as for ``attach``.
    """
    control = control or OptimizedSpaceTime()
    denoiser = denoiser_of(pipe)
    _check_optimizable(layout, num_inference_steps)
    check_gradients(denoiser, "An optimisation of weights")
    height, width = image_size(pipe, [layout], {})
    objective = ClipObjective(clip, layout, (height, width), control.region_factor, control.normalise_pixels)
    weights = control.step_weights(layout, num_inference_steps).requires_grad_()
    adam = torch.optim.Adam([weights], lr=control.learning_rate)
    noise = initial_noise(pipe, seed, height, width)
    losses = []
    with _sampling(pipe), attach(pipe, layout, [control.with_weights(weights), *controls]) as attached:
        if any(bound.moves_latents for bound in attached.bound):
            raise ValueError("Weights cannot be optimised with a control that moves latents; leave LayoutGuidance out.")
        if any(bound.guidance_scale is not None for bound in attached.bound):
            raise ValueError("Weights cannot be optimised with a control's own guidance_scale; leave that out.")
        conditioning = denoiser.condition(layout.prompt, (height, width), guidance_scale, negative_prompt)
        pipe.scheduler.set_timesteps(num_inference_steps)
        visited = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps.long().cpu()]
        check_schedule(visited, denoiser.prediction_type)
        total = control.epochs * len(pipe.scheduler.timesteps)
        with tqdm(total=total, desc="optimising weights", unit="step", disable=not progress) as bar:
            options: dict[str, Any] = {"last_steps": control.last_steps or None, "checkpointing": checkpointing}
            options["after_call"] = _counted(bar, on_step)
            for _ in range(control.epochs):
                latents = sample_latents(pipe, conditioning, noise, num_inference_steps, **options)
                losses.append(_step(adam, objective(decode(pipe, latents)), weights, control.mix == "convex"))
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return OptimizedWeights(weights.detach().clone(), tuple(losses))


def _check_optimizable(layout: Layout, num_inference_steps: int) -> None:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}.")
    if not any(description(region) for region in layout.regions):
        raise ValueError("No region of the layout has a phrase or a prompt, so no weight can be optimised; add one.")


def _counted(bar: tqdm, on_step: OnStep | None) -> Callable[[], None]:
    """Return a function that counts a step on ``bar``, and calls ``on_step``."""
    steps = itertools.count(1)

    def after_call() -> None:
        bar.update()
        if on_step is not None:
            on_step(SamplingStep(next(steps), int(bar.total), None))

    return after_call


def _step(adam: torch.optim.Optimizer, loss: Tensor, weights: Tensor, convex: bool) -> float:
    """Take one step of Adam on ``loss``, clamp the weights to [0, 1] for a convex mix, and return the loss."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError("The loss of the optimisation is not finite; use float32 or bfloat16.")
    adam.zero_grad()
    # Also on a GPU in this thread: steps run again here, and controls refuse denoiser calls from another thread.
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()
    adam.step()
    if convex:
        with torch.no_grad():
            weights.clamp_(0, 1)
    return value


@contextmanager
def _sampling(pipe: DiffusionPipeline) -> Iterator[None]:
    """Give the pipeline a differentiable scheduler and turn off gradients of its parameters; undone at the end.

    The denoiser's own gradient checkpointing is turned off, since it would run layers again after the controls have
    been removed from them.
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
    """Load the CLIP that :class:`OptimizedSpaceTime`'s ``clip`` names, on the pipeline's device.

    ValueError when it is not found.
    """
    return clip_beside(name, str(pipe.config.get("_name_or_path", "")), pipe.device)


def clip_beside(name: str, base: str, device: torch.device | str = "cpu") -> Clip:
    """Load the CLIP as :func:`find_clip` does, for a base given by folder or hub id, which need not be loaded."""
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
    on_step: OnStep | None = None,
) -> GenerateOutput:
    """Generate images as :func:`~localctl.sampling.generate`, optimising weights for each layout and seed.

    Args:
        controls: exactly one :class:`OptimizedSpaceTime`, whose weights are optimised, and any others.
        sampling, num_inference_steps, guidance_scale: as for :func:`~localctl.sampling.generate`.
        clip: the CLIP that the control names, if it is loaded already.
        on_step: as for :func:`optimize_weights`, and then for :func:`~localctl.sampling.generate`.

    Raises:
        ValueError: not exactly one such control; a setting of sampling that an optimisation does not support; or as for
            :func:`optimize_weights`.
    """
    found = [control for control in controls if isinstance(control, OptimizedSpaceTime)]
    if len(found) != 1:
        raise ValueError(f"There are {len(found)} controls to optimise; give one OptimizedSpaceTime.")
    optimized = found[0]
    others = [control for control in controls if not isinstance(control, OptimizedSpaceTime)]
    clip = clip or find_clip(optimized.clip, pipe)
    given = Sampling(None, guidance_scale, num_inference_steps, seeds=seeds)
    resolved = resolve_sampling(pipe, given, sampling).over(Sampling(None, 7.5, 50))  # the pipelines' own defaults
    for name in ("guidance_rescale", "clip_skip", "eta"):
        if getattr(resolved, name):
            raise ValueError(f"{name} cannot be combined with OptimizedSpaceTime; use SpaceTimeAttention.")
    options: dict[str, Any] = {
        "num_inference_steps": resolved.num_inference_steps,
        "guidance_scale": resolved.guidance_scale,
        "negative_prompt": negative_prompt,
    }
    outputs = []
    with scheduled(pipe, resolved), weighted_prompts(pipe, resolved.prompt_weighting):
        for item, seed in itertools.product(as_layouts(layout), resolved.seeds):
            weights = optimize_weights(
                pipe, item, clip, optimized, seed=seed, controls=others, progress=progress, on_step=on_step, **options
            ).weights
            final = [one.with_weights(weights) if isinstance(one, OptimizedSpaceTime) else one for one in controls]
            outputs.append(generate(pipe, item, final, seed, on_step=on_step, **options))
    return GenerateOutput(
        [image for output in outputs for image in output.images],
        tuple(seed for output in outputs for seed in output.seeds),
        tuple(item for output in outputs for item in output.layouts),
    )
