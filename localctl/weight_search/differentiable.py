"""The sampling of one picture as plain code that can be differentiated, step by step like the stock pipeline's.

Call everything inside ``attach``: the controls see these calls of the U-Net as those of the pipeline. With per-step
checkpointing, a step keeps nothing but its latents, and is run again when the gradient passes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from localctl import diffusion

DIFFERENTIABLE = ("DDIMScheduler", "PNDMScheduler")


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is given beside latents and timestep. text: (R, K, C), the negative prompt's row first if there is
    guidance; added: what SDXL wants besides, or None."""

    text: Tensor
    added: dict[str, Tensor] | None
    guidance_scale: float

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


def is_differentiable(scheduler: Any) -> bool:
    """Whether :func:`sample_latents` can sample with it: DDIM, and PNDM without Runge-Kutta steps (that is, PLMS)."""
    name = type(scheduler).__name__
    return name in DIFFERENTIABLE and (name != "PNDMScheduler" or scheduler.config.skip_prk_steps)


@torch.no_grad()
def encode(
    pipe: DiffusionPipeline, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
) -> Conditioning:
    """The conditioning of one picture of ``size`` = (height, width), as the stock pipelines make it. Inside ``attach``,
    this begins a call."""
    options = {
        "device": pipe.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guidance_scale > 1,
        "negative_prompt": negative_prompt,
    }
    text, negative, *pooled = pipe.encode_prompt(prompt, **options)
    rows = [negative, text] if guidance_scale > 1 else [text]
    added = None
    if pooled:  # SDXL
        projection = pipe.text_encoder_2.config.projection_dim
        times = pipe._get_add_time_ids(size, (0, 0), size, dtype=text.dtype, text_encoder_projection_dim=projection)
        pools = [pooled[1], pooled[0]] if guidance_scale > 1 else [pooled[0]]
        added = {"text_embeds": torch.cat(pools), "time_ids": times.to(text.device).repeat(len(rows), 1)}
    return Conditioning(torch.cat(rows), added, guidance_scale)


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
    """Latents (1, c, h, w) after all steps; those of the stock pipeline.

    Args:
        noise: standard normal (1, c, h, w), what the pipeline takes as ``latents``.
        last_steps: gradients through so many of the last calls of the U-Net; None = through all.
        checkpointing: keep the memory of one step instead of all; each step is then run twice.
        after_call: called after each call of the U-Net in the forward direction.
    """
    scheduler = pipe.scheduler
    assert is_differentiable(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=pipe.device)
    latents = noise.to(pipe.device, pipe.unet.dtype) * scheduler.init_noise_sigma

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        rows = torch.cat([latents] * len(conditioning.text))
        output = pipe.unet(
            scheduler.scale_model_input(rows, timestep),
            timestep,
            encoder_hidden_states=conditioning.text,
            added_cond_kwargs=conditioning.added,
            return_dict=False,
        )[0]
        if not conditioning.guided:
            return output
        negative, positive = output.chunk(2)
        return negative + conditioning.guidance_scale * (positive - negative)

    times = scheduler.timesteps
    first = 0 if last_steps is None else max(0, len(times) - last_steps)
    for index, timestep in enumerate(times):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= first):
            if checkpointing and torch.is_grad_enabled():
                output = checkpoint(predict, latents, timestep, use_reentrant=False, preserve_rng_state=False)
            else:
                output = predict(latents, timestep)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        after_call()
    return latents


def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], as the pipeline would save them but for rounding to 8 bits."""
    pixels = diffusion.decode(pipe.vae, latents.to(pipe.vae.dtype))
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
