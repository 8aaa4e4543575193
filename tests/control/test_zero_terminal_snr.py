"""Schedules that end at zero signal: every control, with every scheduler and spacing, stays finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT, Watch, adapter_control, draw
from composition_helpers import sibling
from diffusers import StableDiffusionPipeline

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import CallContext
from localctl.control.forward_guidance import ForwardGuidance
from localctl.control.latents import SIGNAL_FLOOR, sigma_at
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.negative_prompts import NegativePrompts
from localctl.diffusion import x0_from_eps
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.sampling import generate
from localctl.weight_search.weights import OptimizedSpaceTime, optimize_weights

SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
DROP_IT = ("PNDMScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler")
LARGEST = math.sqrt((1 - SIGNAL_FLOOR) / SIGNAL_FLOOR)


def zero_signal(pipe: Any, name: str, spacing: str = "trailing") -> Any:
    """Give ``pipe`` this scheduler, with no signal at the last timestep."""
    options: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    options |= {"PNDMScheduler": {"skip_prk_steps": True}, "LCMScheduler": {"original_inference_steps": 8}}.get(
        name, {}
    )
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


@pytest.mark.parametrize(
    ("name", "spacing"),
    [(name, "trailing") for name in SCHEDULERS + DROP_IT]
    + [
        pytest.param(name, spacing, marks=[] if name == "DDIMScheduler" else pytest.mark.slow)
        for name in SCHEDULERS + DROP_IT
        for spacing in ("leading", "linspace")
    ],
)
def test_attention_controls_with_every_scheduler(name: str, spacing: str, v_pipe: StableDiffusionPipeline) -> None:
    zero_signal(v_pipe, name, spacing)
    seen: list[tuple[int, int, float]] = []
    plain = draw(v_pipe)
    with attach(v_pipe, LAYOUT, [METHODS["bias"](), Watch(seen)]):
        steered = draw(v_pipe)
    sigmas = [sigma for _, _, sigma in seen]
    assert all(0 < sigma <= LARGEST + 1 for sigma in sigmas), sigmas
    assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-3
    if spacing == "trailing" and name not in DROP_IT:  # begins at the last timestep, where nothing is left
        # Schedulers of their own floor compute it in float32.
        assert max(sigmas) == pytest.approx(LARGEST, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", pytest.param("DDPMScheduler", marks=pytest.mark.slow), "EulerDiscreteScheduler"]
)
def test_every_control_nested_and_generate(
    name: str, v_pipe: StableDiffusionPipeline, make_adapter: Callable[..., LocalAdapter]
) -> None:
    zero_signal(v_pipe, name)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    plain = generate(v_pipe, PROMPT, (), 1, **options).images[0]
    assert plain.isfinite().all()
    guidance = LayoutGuidance(end=1.0, threshold=0.0, scale=3.0)
    controls = [make() for make in METHODS.values()]
    controls += [adapter_control(make_adapter()), ForwardGuidance(end=1.0), guidance]
    for control in controls:
        image = generate(v_pipe, LAYOUT, control, 1, **options).images[0]
        assert image.isfinite().all() and (image - plain).abs().max() > 1e-4, control
    with attach(v_pipe, LAYOUT, METHODS["bias"]()), attach(v_pipe, LAYOUT, [guidance, AttentionMaps()]):
        assert draw(v_pipe, num_inference_steps=3).isfinite().all()
    with attach(v_pipe, LAYOUT, [METHODS["bias"](), guidance, AttentionMaps(), NegativePrompts()]):
        assert draw(v_pipe, num_inference_steps=3).isfinite().all()


def test_the_noise_level_is_computed_only_when_it_is_read(
    v_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, make_adapter: Callable[..., LocalAdapter]
) -> None:
    asked: list[float] = []

    def counted(scheduler: Any, timestep: float, times: list[float]) -> float:
        asked.append(timestep)
        return sigma_at(scheduler, timestep, times)

    monkeypatch.setattr("localctl.control.attachment.sigma_at", counted)
    with attach(v_pipe, LAYOUT, [adapter_control(make_adapter()), METHODS["spacetime"](), METHODS["dense"]()]):
        draw(v_pipe)
    assert not asked
    with attach(v_pipe, LAYOUT, METHODS["bias"]()):
        draw(v_pipe)
    assert len(asked) == 2  # once a step, for all layers


def test_a_context_takes_a_number_or_a_function() -> None:
    def context(**options: Any) -> CallContext:
        place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
        return CallContext(0, 2, 9.0, (0,), (True,), (8, 8), (64, 64), **place, **options)

    asked: list[int] = []

    def level() -> float:
        asked.append(1)
        return 3.0

    lazy = context(sigma=level)
    assert not asked and lazy.sigma == lazy.only([0]).sigma == 3.0 and len(asked) == 1
    assert context(sigma=2.0).sigma == 2.0 and math.isnan(context().sigma)


def test_noise_levels_that_a_scheduler_leaves_infinite(v_pipe: StableDiffusionPipeline) -> None:
    betas = [*torch.linspace(1e-3, 2e-2, 99).tolist(), 1.0]  # no setting drops this
    for name in ("HeunDiscreteScheduler", "LMSDiscreteScheduler", "DDIMScheduler", "PNDMScheduler"):
        kind = getattr(diffusers, name)
        scheduler = kind(100, trained_betas=betas, timestep_spacing="trailing", prediction_type="v_prediction")
        scheduler.set_timesteps(5)
        sigmas = [sigma_at(scheduler, float(time)) for time in scheduler.timesteps]
        assert max(sigmas) <= LARGEST + 1 and min(sigmas) > 0, name
    start = diffusers.DDIMScheduler(100, trained_betas=[0.0, *betas[1:]])
    start.set_timesteps(100)
    assert 0 < sigma_at(start, 0.0) < 1e-3  # no noise at all


def test_image_to_image_from_pure_noise(v_pipe: StableDiffusionPipeline) -> None:
    pipe = sibling(zero_signal(v_pipe, "DDIMScheduler"), "Img2Img")
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with attach(pipe, LAYOUT, METHODS["bias"]()):
        options: dict[str, Any] = {"image": photo, "strength": 1.0, "num_inference_steps": 3, "output_type": "latent"}
        assert pipe(PROMPT, **options).images.isfinite().all()


def test_the_conversion_is_finite_at_both_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    a, b = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert x0_from_eps(a, b, ends).isfinite().all()


def test_weights_are_optimised_on_such_a_schedule(v_pipe: StableDiffusionPipeline) -> None:
    clip, control = Clip(MICRO_CLIP), OptimizedSpaceTime(epochs=1)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "progress": False}
    found = optimize_weights(zero_signal(v_pipe, "DDIMScheduler"), LAYOUT, clip, control, **options)
    assert found.weights.isfinite().all() and math.isfinite(found.losses[0])
    v_pipe.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"schedule ends at zero signal.*use v_prediction"):
        optimize_weights(v_pipe, LAYOUT, clip, control, **options)
