"""The differentiable sampling: the stock pipeline's latents, and right gradients, whatever is kept in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import CALL_TERMS, LAYOUT, assert_same_draw
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from tolerances import rounding
from torch import Tensor

from localctl.control.attach import attach
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.denoisers import denoiser_of
from localctl.pipelines import set_scheduler
from localctl.sampling import generate, initial_noise
from localctl.weight_search.differentiable import decode, is_differentiable, sample_latents

STEPS = 3


def sampled(pipe: Any, weights: Tensor, guidance_scale: float = 3.0, mix: str = "convex", **options: Any) -> Tensor:
    """Latents of LAYOUT, seed 5, under these weights and a bias."""
    height, width = 64, 96
    with attach(pipe, LAYOUT, [SpaceTimeAttention(weights=weights, mix=mix), RegionBias(strength=0.5)]):
        conditioning = denoiser_of(pipe).condition(LAYOUT.prompt, (height, width), guidance_scale, "ships")
        return sample_latents(pipe, conditioning, initial_noise(pipe, 5, height, width), len(weights), **options)


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
@pytest.mark.parametrize("kind", ["sd_pipe", "v_pipe", "sdxl_pipe"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_the_stock_pipelines_picture(
    kind: str, scheduler: str, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    if kind != "sd_pipe" and (guidance_scale == 1.0) != (scheduler == "pndm"):
        pytest.skip("every kind with either scheduler is enough")
    pipe = request.getfixturevalue(kind)
    set_scheduler(pipe, scheduler)
    weights = torch.rand(STEPS, 2, generator=torch.Generator().manual_seed(0))
    controls = [SpaceTimeAttention(weights=weights), RegionBias(strength=0.5)]
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "negative_prompt": "ships"}
    options |= {"height": 64, "width": 96}
    expected = generate(pipe, LAYOUT, controls, 5, output_type="latent", **options).images[0]
    with torch.no_grad():
        latents = sampled(pipe, weights, guidance_scale)
    assert_same_draw(latents[0], expected, calls=STEPS)
    picture = generate(pipe, LAYOUT, controls, 5, output_type="pt", **options).images[0]
    assert_same_draw(decode(pipe, latents)[0], picture, calls=STEPS + 1)  # and the VAE
    assert (latents[0] - generate(pipe, LAYOUT, (), 5, output_type="latent", **options).images[0]).abs().max() > 1e-3


def gradient(pipe: Any, weights: Tensor, **options: Any) -> Tensor:
    wanted = weights.clone().requires_grad_()
    height, width = 64, 64
    control = SpaceTimeAttention(weights=wanted)
    with attach(pipe, LAYOUT, control):
        conditioning = denoiser_of(pipe).condition(LAYOUT.prompt, (height, width), 3.0, None)
        noise = initial_noise(pipe, 0, height, width)
        sample_latents(pipe, conditioning, noise, len(weights), **options).square().sum().backward()
    assert wanted.grad is not None
    return wanted.grad


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_gradients_are_those_of_finite_differences(sd_pipe: StableDiffusionPipeline, scheduler: str) -> None:
    set_scheduler(sd_pipe, scheduler)
    for module in (sd_pipe.unet, sd_pipe.text_encoder):
        module.double()
    weights = torch.rand(STEPS, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.4

    def value(weights: Tensor) -> float:
        with attach(sd_pipe, LAYOUT, SpaceTimeAttention(weights=weights)), torch.no_grad():
            conditioning = denoiser_of(sd_pipe).condition(LAYOUT.prompt, (64, 64), 3.0, None)
            noise = initial_noise(sd_pipe, 0, 64, 64)
            return float(sample_latents(sd_pipe, conditioning, noise, STEPS).square().sum())

    found = gradient(sd_pipe, weights)
    size = 1e-4
    for place in ((0, 0), (1, 1), (STEPS - 1, 0)):
        moved = torch.zeros_like(weights)
        moved[place] = size
        expected = (value(weights + moved) - value(weights - moved)) / (2 * size)
        assert float(found[place]) == pytest.approx(expected, rel=1e-4)
        assert abs(expected) > 1e-3


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_checkpointing_changes_nothing_and_truncation_what_it_says(
    sd_pipe: StableDiffusionPipeline, scheduler: str
) -> None:
    set_scheduler(sd_pipe, scheduler)
    weights = torch.full((STEPS, 2), 0.5)
    whole = gradient(sd_pipe, weights)
    torch.testing.assert_close(
        gradient(sd_pipe, weights, checkpointing=False),
        whole,
        rtol=0,
        atol=rounding(2 * STEPS * CALL_TERMS) * float(whole.abs().max()),
    )
    last = gradient(sd_pipe, weights, last_steps=1)
    torch.testing.assert_close(
        last[-1], whole[-1], rtol=0, atol=rounding(2 * STEPS * CALL_TERMS) * float(whole.abs().max())
    )
    assert not last[:-1].any() and bool((whole != 0).all())
    assert torch.equal(gradient(sd_pipe, weights, last_steps=99), whole)


def test_which_schedulers_can_be_differentiated(sd_pipe: StableDiffusionPipeline) -> None:
    config = sd_pipe.scheduler.config
    assert is_differentiable(DDIMScheduler.from_config(config))
    assert is_differentiable(PNDMScheduler.from_config(config, skip_prk_steps=True))
    assert not is_differentiable(PNDMScheduler.from_config(config, skip_prk_steps=False))
    assert not is_differentiable(DPMSolverMultistepScheduler.from_config(config))
