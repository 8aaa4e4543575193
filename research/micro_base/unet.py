"""The U-Net of the embedded base: noisy latents (B, 4, 16, 16), timesteps, text states (B, 77, 128) -> v or epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from localctl.diffusion import add_noise, training_target
from research.micro_base.clip import token_ids
from research.micro_base.data import SceneCache
from research.micro_base.focus import Focus, focus_loss, record_attention
from research.micro_base.loop import LoopConfig, save_tensors, train

FOCUS_WEIGHT = 0.04
FAR, NEAR = 0.25, 2.25  # weights of the error away from objects, and at objects


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


@dataclass(frozen=True)
class LatentCache:
    """Encoded images and captions.

    latents: fp16 (n, 4, 16, 16), scaled. states: fp16 (captions, 77, width); row 0 is the empty prompt. lengths:
    (captions,), tokens before the padding. caption_of: (n,), row of ``states`` for each scene.
    """

    latents: Tensor
    states: Tensor
    lengths: Tensor
    caption_of: Tensor


@torch.no_grad()
def latent_cache(
    cache: SceneCache, vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, path: Path
) -> LatentCache:
    """Encode every image and every distinct caption, or read them from the file ``path``."""
    if path.exists():
        # The file is a cache of this program, but the folder may be from anybody: unpickle nothing but tensors.
        return LatentCache(**torch.load(path, weights_only=True))
    vae.eval().to(memory_format=torch.channels_last)
    latents = []
    for start in tqdm(range(0, len(cache), 32), desc="encoding images", mininterval=10):
        pixels = torch.from_numpy(cache.images[start : start + 32].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        latents.append((posterior.mean * vae.config.scaling_factor).half().contiguous())
    states, lengths, rows = encode_captions(cache.captions, text, tokenizer)
    content = {"latents": torch.cat(latents), "states": states, "lengths": lengths, "caption_of": rows}
    save_tensors(path, content)
    return LatentCache(**content)


@torch.no_grad()
def encode_captions(
    captions: list[str], text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``states``, ``lengths`` and ``caption_of`` of :class:`LatentCache`."""
    text.eval()
    unique = list(dict.fromkeys(["", *captions]))
    states, lengths = [], []
    for start in tqdm(range(0, len(unique), 128), desc="encoding captions", mininterval=10):
        ids = token_ids(tokenizer, unique[start : start + 128])
        states.append(text(ids).last_hidden_state.half())
        lengths.append((ids != tokenizer.eos_token_id).sum(1))
    row = {caption: i for i, caption in enumerate(unique)}
    return torch.cat(states), torch.cat(lengths), torch.tensor([row[c] for c in captions])


def text_batch(cache: LatentCache, rows: Tensor, rng: np.random.Generator, padding_dropout: float) -> Tensor:
    """Return text states (B, 77, width), in a random share of rows with the empty prompt's states as padding.

    This makes the U-Net attend to the words, not to the summary in the padding: region control steers words.
    """
    states = cache.states[rows].float()
    drop = torch.from_numpy(rng.random(len(rows)) < padding_dropout)
    is_padding = torch.arange(states.shape[1])[None] >= cache.lengths[rows][:, None]  # (B, 77)
    replace = (is_padding & drop[:, None])[..., None]
    return torch.where(replace, cache.states[0].float(), states)


def sample_timesteps(batch: int, rng: np.random.Generator) -> np.ndarray:
    """Sample timesteps (B,) in [0, 1000), one stratum of the distribution per row, so that all batches spread alike.

    72 % are in [190, 700), where shapes form; 22 % are above, where the number and the places of objects form; below,
    only texture is left (abar > 0.7).
    """
    u = (np.arange(batch) + rng.random(batch)) / batch
    return np.interp(u, [0.0, 0.06, 0.78, 1.0], [0.0, 190.0, 700.0, 999.999]).astype(np.int64)


def train_unet(
    cache: LatentCache,
    config: LoopConfig,
    folder: Path,
    batch: int = 32,
    empty: float = 0.1,
    padding_dropout: float = 0.5,
    initial: dict[str, Tensor] | None = None,
    prediction_type: str = "v_prediction",
    focus: Focus | None = None,
) -> tuple[UNet2DConditionModel, bool]:
    """Train the U-Net; return it, and whether all steps are done.

    It predicts epsilon with the min-SNR weight, gamma 5 (arXiv 2303.09556), or v (arXiv 2202.00512) without a weight.

    Args:
        empty: share of empty captions.
        padding_dropout: share of rows as in :func:`text_batch`.
        initial: weights to start from.
        focus: objects of the cached scenes, for the losses of ``research.micro_base.focus``.
    """
    torch.manual_seed(config.seed)
    unet = new_unet(cache.states.shape[-1])
    if initial:
        unet.load_state_dict(initial)
    scheduler = new_scheduler(prediction_type)
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5) / snr if prediction_type == "epsilon" else torch.ones_like(snr)
    odds = None if focus is None else focus.odds.cumsum(0)
    attention_weights = [] if focus is None else record_attention(unet)

    def loss_fn(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        attention_weights.clear()
        chosen = _sample_scenes(len(cache.latents), odds, batch, rng)
        latents = cache.latents[chosen].float()
        is_empty = torch.from_numpy(rng.random(batch) < empty)
        rows = cache.caption_of[chosen].masked_fill(is_empty, 0)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        t = torch.from_numpy(rng.permutation(sample_timesteps(batch, rng)))
        sample = add_noise(latents, noise, t, alphas)
        target = training_target(sample, alphas, prediction_type)
        output = unet(sample.noisy, t, text_batch(cache, rows, rng, padding_dropout)).sample
        error = (output - target).square().mean(1)  # (B, 16, 16)
        mse = error.mean((1, 2))  # (B,)
        if focus is None:
            return {"loss": (mse * weight[t]).mean(), "mse": mse.mean()}
        near = focus.near[chosen].float()
        # At large t, the places of objects are not determined yet: a larger weight there would favour objects.
        settled = ((450 - t.float()) / 150).clamp(0, 1)[:, None, None]
        weighted = (error * (1 + settled * (FAR + (NEAR - FAR) * near - 1))).mean((1, 2))
        seen = ((800 - t.float()) / 200).clamp(0, 1) * ~is_empty  # with more noise, places are not determined
        attention, share = focus_loss(attention_weights, focus.masks[chosen].float(), focus.tokens[chosen], seen)
        loss = (weighted * weight[t]).mean() + FOCUS_WEIGHT * attention
        objects = (error * near).sum() / near.sum().clamp(min=1)
        return {"loss": loss, "mse": mse.mean(), "objects": objects, "attention": share}

    done = train("unet", unet, loss_fn, config, folder)
    unet.set_attn_processor(AttnProcessor2_0())
    return unet, done


def _sample_scenes(count: int, odds: Tensor | None, batch: int, rng: np.random.Generator) -> Tensor:
    """Sample numbers of scenes (B,): uniformly, or by cumulative ``odds``, one stratum per row."""
    if odds is None:
        return torch.from_numpy(rng.integers(count, size=batch))
    places = torch.from_numpy((np.arange(batch) + rng.random(batch)) / batch)
    return torch.searchsorted(odds, places).clamp(max=count - 1)
