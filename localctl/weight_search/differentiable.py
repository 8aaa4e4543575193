"""Differentiable sampling of one image, step by step as in the stock pipeline.

Call everything inside ``attach``: the controls treat these calls of the denoiser as the pipeline's. With per-step
checkpointing, a step stores only its latents, and runs again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from localctl import diffusion
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import Conditioning

DIFFERENTIABLE = ("DDIMScheduler", "PNDMScheduler")


def is_differentiable(scheduler: Any) -> bool:
    """Return whether :func:`sample_latents` supports the scheduler: DDIM, or PNDM without Runge-Kutta steps (PLMS)."""
    name = type(scheduler).__name__
    return name in DIFFERENTIABLE and (name != "PNDMScheduler" or scheduler.config.skip_prk_steps)


def sample_latents(
    pipe: DiffusionPipeline,
    conditioning: Conditioning,
    noise: Tensor,
    num_inference_steps: int,
    *,
    last_steps: int | None = None,
    checkpointing: bool = True,
    after_call: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return the latents (1, c, h, w) after all steps, the same as the stock pipeline's.

    Args:
        conditioning: from ``Denoiser.condition``, computed within the same ``attach``.
        noise: standard normal (1, c, h, w), as the pipeline takes it as ``latents``.
        last_steps: backpropagate through this many of the last calls of the denoiser; None = through all.
        checkpointing: use the memory of one step instead of all; each step then runs twice.
        after_call: called after each call of the denoiser in the forward pass.
    """
    scheduler, denoiser = pipe.scheduler, denoiser_of(pipe)
    assert is_differentiable(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=pipe.device)
    latents = noise.to(pipe.device, denoiser.module.dtype) * scheduler.init_noise_sigma

    times = scheduler.timesteps
    first = 0 if last_steps is None else max(0, len(times) - last_steps)
    for index, timestep in enumerate(times):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= first):
            if checkpointing and torch.is_grad_enabled():
                again = {"use_reentrant": False, "preserve_rng_state": False}
                output = checkpoint(denoiser.predict, latents, timestep, conditioning, **again)
            else:
                output = denoiser.predict(latents, timestep, conditioning)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        after_call()
    return latents


def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Decode latents (B, c, h, w) to images (B, 3, H, W) in [0, 1], as the pipeline does but not rounded to 8 bits."""
    pixels = diffusion.decode(pipe.vae, latents.to(pipe.vae.dtype))
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
