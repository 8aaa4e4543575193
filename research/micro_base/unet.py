"""The U-Net of the embedded base: noisy latents (B, 4, 16, 16), timesteps, text states (B, 77, 128) -> v or epsilon.

And what every denoiser needs: encoded scenes, and a training by steps or by the clock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from research.micro_base.clip import token_ids
from research.micro_base.clock import ClockConfig, train_by_clock
from research.micro_base.data import SceneCache
from research.micro_base.focus import Focus
from research.micro_base.loop import LoopConfig, save_tensors, train
from research.micro_base.preference import Preference
from research.micro_base.unet_loss import RECIPE, DenoiserLoss, LatentCache, Recipe, Sampler, UNetLoss, to

Encode = Callable[[list[str]], Tensor]  # texts to states (B, T, width)


def new_unet(text_width: int = 128) -> UNet2DConditionModel:
    """Return an untrained U-Net."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text_width,
        attention_head_dim=4,
    )


def new_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    """Return the scheduler of the base, with linear betas.

    SD1.5's scaled_linear betas leave abar = 0.0047 at the last step, so the mean of the image leaks into the noisiest
    latents (white backgrounds turn gray); linear betas leave 4e-5. With so little signal, epsilon carries hardly any
    information on large flat areas, while v does (docs/log.md has the comparison).
    """
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )


@torch.no_grad()
def latent_cache(
    cache: SceneCache, vae: AutoencoderKL, encode: Encode, tokenizer: CLIPTokenizer, path: Path
) -> LatentCache:
    """Encode every image and every distinct caption, or read them from the file ``path``."""
    if path.exists():
        # The file is a cache of this program, but the folder may be from anybody: unpickle nothing but tensors.
        return LatentCache(**torch.load(path, weights_only=True))
    latents = []
    for start in tqdm(range(0, len(cache), 256), desc="encoding images", mininterval=10):
        latents.append(encode_images(vae, cache.images[start : start + 256]))
    states, lengths, rows = encode_captions(cache.captions, encode, tokenizer)
    content = {"latents": torch.cat(latents), "states": states, "lengths": lengths, "caption_of": rows}
    save_tensors(path, content)
    return LatentCache(**content)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Return the scaled latents fp16 (B, 4, 16, 16) of images uint8 (B, 128, 128, 3), the means of their posteriors."""
    vae.eval().to(memory_format=torch.channels_last)
    latents = []
    size = 32 if vae.device.type == "cpu" else 256
    for start in range(0, len(images), size):
        batch = torch.from_numpy(images[start : start + size].copy()).to(vae.device)
        pixels = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        latents.append((posterior.mean * vae.config.scaling_factor).half().contiguous().cpu())
    return torch.cat(latents)


@torch.no_grad()
def encode_captions(captions: list[str], encode: Encode, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``states``, ``lengths`` and ``caption_of`` of :class:`LatentCache`."""
    unique = list(dict.fromkeys(["", *captions]))
    states, lengths = [], []
    for start in tqdm(range(0, len(unique), 128), desc="encoding captions", mininterval=10):
        ids = token_ids(tokenizer, unique[start : start + 128])
        states.append(encode(unique[start : start + 128]).half().cpu())
        lengths.append((ids != tokenizer.eos_token_id).sum(1))
    row = {caption: i for i, caption in enumerate(unique)}
    return torch.cat(states), torch.cat(lengths), torch.tensor([row[c] for c in captions])


@dataclass(frozen=True)
class Kind:
    """A kind of denoiser: its name, a new one for a cache of scenes, and its loss."""

    name: str
    new: Callable[[LatentCache], Any]
    loss: Callable[[Any, LatentCache, Recipe, Focus | None], DenoiserLoss]


def _unet_loss(unet: Any, cache: LatentCache, recipe: Recipe, focus: Focus | None) -> UNetLoss:
    alphas = new_scheduler(recipe.prediction_type).alphas_cumprod
    return UNetLoss(unet, cache, alphas.to(cache.latents.device), recipe, focus)


UNET = Kind("unet", lambda cache: new_unet(cache.states.shape[-1]), _unet_loss)


def train_denoiser(
    kind: Kind,
    cache: LatentCache,
    config: LoopConfig | ClockConfig,
    folder: Path,
    batch: int = 32,
    recipe: Recipe = RECIPE,
    initial: dict[str, Tensor] | None = None,
    focus: Focus | None = None,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    wrong: Tensor | None = None,
    prefer: float = 1.0,
) -> tuple[Any, bool]:
    """Train a denoiser; return it, and whether all steps are done.

    Args:
        config: of a training by steps, or by the clock.
        initial: weights to start from.
        focus: objects of the cached scenes, for the losses of ``research.micro_base.focus``.
        bf16: compute in bfloat16, in a training by steps under autocast; the weights are updated in float32.
        wrong: latents of a wrong image for each cached scene, for the loss of ``research.micro_base.preference``.
        prefer: weight of this loss; its reference has the weights to start from.
    """
    torch.manual_seed(config.seed)
    model = kind.new(cache)
    if initial:
        model.load_state_dict(initial)
    device = torch.device(device)
    model.to(device)
    if device.type == "cuda":  # there, convolutions are fastest in this format; on a CPU, results stay those of before
        model.to(memory_format=torch.channels_last)
    working = copy.deepcopy(model).to(torch.bfloat16) if bf16 and isinstance(config, ClockConfig) else model
    odds = None if focus is None else focus.odds.cumsum(0)
    on_device = to(cache, device)
    preference = None
    if wrong is not None:  # before the loss records the attention of what it trains
        reference = kind.loss(copy.deepcopy(working).requires_grad_(False), on_device, recipe, None)
        preference = Preference(wrong.to(device), reference.errors, prefer)
    loss = kind.loss(working, on_device, recipe, None if focus is None else to(focus, device))
    loss.preference = preference
    sampler = Sampler(cache.latents.shape, odds, batch, recipe, config.seed, device)

    def step_loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return loss(to(sampler(rng), device))

    if isinstance(config, ClockConfig):
        done = train_by_clock(kind.name, model, working, loss, sampler.on_device, config, folder)
    else:
        done = train(kind.name, model, step_loss, config, folder)
    loss.release()
    return model, done
