"""The VAE of the embedded base: pixels (B, 3, 128, 128) <-> latents (B, 4, 16, 16)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from localctl.micro.scenes import SIZE
from research.micro_base.data import SceneCache
from research.micro_base.loop import LoopConfig, train

CROP = 64


def new_vae() -> AutoencoderKL:
    """Return an untrained VAE. It has a single norm group, as more of them lose the level of flat colours."""
    channels = (16, 32, 64, 128)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def _crop(cache: SceneCache, index: int, rng: np.random.Generator) -> np.ndarray:
    """Return a crop of 64x64 px around an object, where edges are more frequent."""
    centers = cache.centers[index]
    x, y = centers[int(rng.integers(len(centers)))]
    jitter = rng.uniform(-16, 16, 2)
    left = int(np.clip(x + jitter[0] - CROP / 2, 0, SIZE - CROP))
    top = int(np.clip(y + jitter[1] - CROP / 2, 0, SIZE - CROP))
    return cache.images[index, top : top + CROP, left : left + CROP]


def _batch(caches: list[SceneCache], count: int, whole: bool, rng: np.random.Generator) -> Tensor:
    """Sample pixels (count, 3, h, w), three of four from the first cache."""
    images = []
    for _ in range(count):
        cache = caches[0] if rng.random() < 0.75 else caches[-1]
        index = int(rng.integers(len(cache)))
        image = cache.images[index] if whole else _crop(cache, index, rng)
        images.append(image[:, ::-1] if rng.random() < 0.5 else image)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_terms(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the loss of the whole VAE and its terms; ``generator`` samples the latents."""
    posterior = vae.encode(pixels).latent_dist
    terms = pixel_terms(vae.decode(posterior.sample(generator)).sample, pixels)
    kl = posterior.kl().mean()
    return {**terms, "loss": terms["loss"] + 1e-6 * kl, "kl": kl}


def pixel_terms(output: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """Return L1 + squared error + L1 of the differences along x and y, which keeps edges sharp, and the terms."""
    l1, mse = F.l1_loss(output, pixels), F.mse_loss(output, pixels)
    edges = sum(F.l1_loss(a, b) for a, b in zip(_differences(output), _differences(pixels), strict=True))
    return {"loss": l1 + mse + edges, "l1": l1, "mse": mse}


def train_vae(caches: list[SceneCache], config: LoopConfig, folder: Path) -> tuple[AutoencoderKL, bool]:
    """Train a new VAE; return it, and whether all steps are done.

    The first 80 % of the steps use crops around objects, the others whole images.
    """
    torch.manual_seed(config.seed)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss_fn(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        whole = step >= 0.8 * config.steps
        pixels = _batch(caches, 6 if whole else 12, whole, rng)
        return reconstruction_terms(vae, pixels, torch.Generator().manual_seed(int(rng.integers(2**62))))

    done = train("vae", vae, loss_fn, config, folder)
    return vae, done


def train_decoder(
    vae: AutoencoderKL, latents: Tensor, images: np.ndarray, config: LoopConfig, folder: Path, noise: float = 0.05
) -> bool:
    """Tune the decoder alone, so that latents and models trained on them stay valid; return whether all steps are done.

    Args:
        latents: (n, 4, h, w), scaled as for the U-Net.
        images: uint8 (n, H, W, 3), of the latents.
        noise: standard deviation of the noise added to unscaled latents, about that of the posterior.
    """
    assert len(latents) <= len(images)
    halves = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    halves.requires_grad_(True)

    def loss_fn(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = np.sort(rng.choice(len(latents), 6, replace=False))
        z = latents[torch.from_numpy(chosen)].float() / vae.config.scaling_factor
        z = z + noise * torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
        pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixel_terms(vae.decode(z).sample, pixels)

    return train("decoder", halves, loss_fn, config, folder)


def load_decoder(vae: AutoencoderKL, weights: dict[str, Tensor]) -> None:
    """Load the weights of :func:`train_decoder` into a VAE."""
    nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).load_state_dict(weights)


@torch.no_grad()
def set_scaling(vae: AutoencoderKL, cache: SceneCache, count: int = 256) -> None:
    """Set the VAE's scaling_factor to 1 / the standard deviation of the latents of ``count`` scenes."""
    vae.eval()
    pixels = torch.from_numpy(cache.images[:count].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(32)])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
