"""The forward process, the conversions between epsilon, v and x0, and encoding and decoding with the VAE.

With flow matching (arXiv 2403.03206), z_t = (1 - sigma) z0 + sigma eps  and the model output is eps - z0. Where other
bases have the table ``alphas_cumprod``, (T,), those have that of sigma, see :func:`flow_sigmas`.

With abar = ``alphas_cumprod[t]``:  z_t = sqrt(abar) z0 + sqrt(1 - abar) eps  (DDPM, arXiv 2006.11239, eq. 4)  and
v = sqrt(abar) eps - sqrt(1 - abar) z0  (arXiv 2202.00512, appendix D).

The conversions take ``alpha_bar`` as a scalar or one value per sample (B,), compute in at least float32, and return
the dtype of their first argument.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localctl.devices import send
from localctl.settings import TIMESTEP_SAMPLINGS

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW = "flow"  # the prediction type of flow matching, with a table of sigma in place of alphas_cumprod
# The smallest root to divide by, for schedules that leave no signal or no noise: there diffusers' schedulers use
# abar = 2**-24. The other roots of real schedules are larger.
ROOT_FLOOR = 2**-12


@dataclass(frozen=True)
class DiffusionSample:
    """A noised batch: ``latents`` z0, ``noise`` eps, ``noisy`` z_t (each (B,C,h,w)) and ``timesteps`` (B,) int64."""

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor


def _roots(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar) and sqrt(1 - abar), broadcastable to ``like``, in its dtype or float32 if that is wider."""
    alpha_bar = _broadcast(alpha_bar, like)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Return () or (B,) values broadcastable to ``like``, in its dtype or float32 if that is wider."""
    values = values.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values  # (B,1,1,1)


def x0_from_eps(noisy: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x0 = (z_t - sqrt(1-abar) eps) / sqrt(abar).

    At abar = 0 it is finite but meaningless, see :func:`check_schedule`.
    """
    signal, sigma = _roots(alpha_bar, noisy)
    return ((noisy - sigma * eps) / signal.clamp(min=ROOT_FLOOR)).to(noisy.dtype)


def x0_from_v(noisy: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x0 = sqrt(abar) z_t - sqrt(1-abar) v; defined for every abar in [0, 1]."""
    signal, sigma = _roots(alpha_bar, noisy)
    return (signal * noisy - sigma * v).to(noisy.dtype)


def velocity(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return v = sqrt(abar) eps - sqrt(1-abar) z0; defined for every abar in [0, 1]."""
    signal, sigma = _roots(alpha_bar, latents)
    return (signal * noise - sigma * latents).to(latents.dtype)


def gather_alpha_bar(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Return ``alphas_cumprod`` (T,) at ``timesteps`` (B,) int64: (B,), on the timesteps' device."""
    return alphas_cumprod.to(timesteps.device)[timesteps]


def add_noise(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str = "epsilon"
) -> DiffusionSample:
    """Add ``noise`` (B,C,h,w) to ``latents`` (B,C,h,w) at ``timesteps`` (B,) int64."""
    assert noise.shape == latents.shape and timesteps.shape == latents.shape[:1]
    if prediction_type == FLOW:
        sigma = _broadcast(gather_alpha_bar(alphas_cumprod, timesteps), latents)
        signal = 1 - sigma
    else:
        signal, sigma = _roots(gather_alpha_bar(alphas_cumprod, timesteps), latents)
    noisy = (signal * latents + sigma * noise).to(latents.dtype)  # (B,C,h,w)
    return DiffusionSample(latents=latents, noise=noise, noisy=noisy, timesteps=timesteps)


def predict_x0(
    noisy: Tensor, model_output: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """Return the clean latents z0' predicted by ``model_output``; all (B,C,h,w), ``timesteps`` (B,) int64.

    Equals ``scheduler.step(...).pred_original_sample`` of DDPM and DDIM without clipping. The error of z0' is that of
    epsilon times sqrt((1-abar)/abar), a factor of 214 in MSE at t = 999 of SD1.5. ValueError for an unknown
    ``prediction_type``.
    """
    check_prediction_type(prediction_type)
    alpha_bar = gather_alpha_bar(alphas_cumprod, timesteps)
    if prediction_type == FLOW:
        return x0_from_flow(noisy, model_output, alpha_bar)
    if prediction_type == "epsilon":
        return x0_from_eps(noisy, model_output, alpha_bar)
    if prediction_type == "v_prediction":
        return x0_from_v(noisy, model_output, alpha_bar)
    return model_output.to(noisy.dtype)


def training_target(sample: DiffusionSample, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """Return the target of the model output for ``sample``: eps, v, z0, or eps - z0, (B,C,h,w). ValueError for an
    unknown type."""
    check_prediction_type(prediction_type)
    if prediction_type == FLOW:
        return sample.noise - sample.latents
    if prediction_type == "epsilon":
        return sample.noise
    if prediction_type == "v_prediction":
        return velocity(sample.latents, sample.noise, gather_alpha_bar(alphas_cumprod, sample.timesteps))
    return sample.latents


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler is one of flow matching, z_t = (1 - sigma) z0 + sigma eps, for v = eps - z0."""
    return "FlowMatch" in type(scheduler).__name__ or bool(getattr(scheduler.config, "use_flow_sigmas", False))


def x0_from_flow(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 = z_t - sigma v; ``sigma``: as ``alpha_bar`` of the other conversions."""
    return (noisy - _broadcast(sigma, noisy) * velocity).to(noisy.dtype)


def flow_sigmas(num_train_timesteps: int, shift: float = 1.0) -> Tensor:
    """Return sigma at each timestep 0 .. T-1, (T,) float32, moved towards the noise by ``shift`` (arXiv 2403.03206,
    eq. 23). A model is given ``sigma * T`` as its timestep."""
    even = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    return (shift * even / (1 + (shift - 1) * even)).float()


def flow_shift(scheduler: Any, tokens: int) -> float:
    """Return a flow-matching scheduler's shift for images of so many tokens: its own, or that of the resolution."""
    config = scheduler.config
    if not getattr(config, "use_dynamic_shifting", False):
        return float(config.shift)
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    mu = config.base_shift + slope * (tokens - low)
    return mu if getattr(config, "time_shift_type", "exponential") == "linear" else math.exp(mu)


def flow_alpha_bar(sigmas: Tensor) -> Tensor:
    """Return abar of the same ratio of image and noise as each sigma of flow matching has."""
    return (1 - sigmas).square() / ((1 - sigmas).square() + sigmas.square())


def check_prediction_type(prediction_type: str) -> None:
    """Raise a ValueError unless ``prediction_type`` is one of ``PREDICTION_TYPES`` or that of flow matching."""
    if prediction_type not in (*PREDICTION_TYPES, FLOW):
        raise ValueError(f"Unknown prediction type {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}.")


def check_schedule(alphas_cumprod: Tensor, prediction_type: str) -> None:
    """Raise a ValueError for a schedule that leaves z0' undefined: epsilon prediction with zero terminal SNR.

    Call it once before training: the conversions themselves check no values, which would synchronise with the device.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon" and not bool((alphas_cumprod > 0).all()):
        raise ValueError(
            "The noise schedule ends at zero signal, where an epsilon prediction does not determine the clean image; "
            "use v_prediction or a schedule without rescale_betas_zero_snr."
        )


def timesteps_from_uniform(
    u: Tensor,
    num_train_timesteps: int,
    sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    timestep_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Map ``u`` (B,) in [0,1) to timesteps (B,) int64 in [0, T-1].

    ``uniform``: t = u T. ``cubic``: t = (1 - u^3) T, which favours the noisy steps that determine structure
    (T2I-Adapter, arXiv 2302.08453, section 3.4). ``logit_normal``: t = sigmoid(n) T for n normal, of ``logit_mean`` and
    ``logit_std`` (arXiv 2403.03206, section 3.1). ``timestep_range``: the fractions of T to which 0 and 1 are moved.
    ValueError for an unknown ``sampling``.
    """
    if sampling not in TIMESTEP_SAMPLINGS:
        raise ValueError(f"Unknown timestep sampling {sampling!r}; choose one of {', '.join(TIMESTEP_SAMPLINGS)}.")
    if sampling == "logit_normal":
        fraction = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    else:
        fraction = u if sampling == "uniform" else 1 - u**3
    low, high = timestep_range
    fraction = low + (high - low) * fraction
    # The clamp matters at the ends: u = 0 of the cubic form, and u just below 1, which may round up to T.
    return (fraction * num_train_timesteps).long().clamp(0, num_train_timesteps - 1)


def latent_size(height: int, width: int, factor: int = 8) -> tuple[int, int]:
    """Return the (h, w) of the latents of a ``height`` x ``width`` image, rounded up if ``factor`` does not divide."""
    return math.ceil(height / factor), math.ceil(width / factor)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Encode ``pixels`` (B,3,H,W) in [-1,1] to scaled latents (B,c,h,w) float32: the mean of the VAE's posterior."""
    return scale_latents(vae, posterior(vae, pixels)[0])


def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (B,c,h,w) float32 each, of the VAE's unscaled latents of ``pixels``.

    ``pixels``: (B,3,H,W) in [-1,1].
    """
    # Without autocast, which would run a VAE that is kept in float32 in half precision.
    pixels = pixels.to(vae.device, vae.dtype)
    with torch.autocast(pixels.device.type, enabled=False):
        found = vae.encode(pixels.unsqueeze(2) if is_for_videos(vae) else pixels).latent_dist
    mean, std = found.mean.float(), found.std.float()
    return (mean[:, :, 0], std[:, :, 0]) if is_for_videos(vae) else (mean, std)


def is_for_videos(vae: Any) -> bool:
    """Return whether a VAE takes videos (B,3,F,H,W), as that of Qwen-Image, and gives (B,c,f,h,w)."""
    return hasattr(vae.config, "temperal_downsample")  # as diffusers spells it


def latent_channels(vae: Any) -> int:
    """Return the number of channels of a VAE's latents."""
    return vae.config.z_dim if is_for_videos(vae) else vae.config.latent_channels


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """Scale the VAE's own latents (B,c,h,w) for the denoiser, by the values in the VAE's config."""
    mean, std, factor = _latent_scale(vae, latents)
    return (latents - mean) * factor if std is None else (latents - mean) * factor / std


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode scaled ``latents`` (B,c,h,w) to pixels (B,3,H,W), about [-1,1], in the VAE's dtype; differentiable."""
    mean, std, factor = _latent_scale(vae, latents)
    return decode_own(vae, (latents if std is None else latents * std) / factor + mean)


def decode_own(vae: Any, latents: Tensor) -> Tensor:
    """Decode the VAE's own, unscaled ``latents`` as :func:`decode` does."""
    latents = latents.to(vae.device, vae.dtype)
    return vae.decode(latents.unsqueeze(2)).sample[:, :, 0] if is_for_videos(vae) else vae.decode(latents).sample


def _latent_scale(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | None, float]:
    """Return (mean, std, factor) of scaled = (latents - mean) * factor / std.

    Mean and std are per channel if the config has ``latents_mean`` and ``latents_std``, and also per place in a patch
    of 2 x 2 if the VAE has a batch normalisation (FLUX.2's); else the mean is its ``shift_factor`` or 0, and the std is
    None.
    """
    config = vae.config
    if hasattr(vae, "bn"):
        std = (vae.bn.running_var + config.batch_norm_eps).sqrt()
        return *(_over_patches(values, like) for values in (vae.bn.running_mean, std)), 1.0
    means, stds = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if means is None or stds is None:
        return getattr(config, "shift_factor", None) or 0.0, None, config.scaling_factor
    mean, std = send(torch.tensor([means, stds], dtype=like.dtype), like.device)[..., None, None].split(1)
    return mean, std, getattr(config, "scaling_factor", 1.0)


def _over_patches(values: Tensor, like: Tensor) -> Tensor:
    """Return values (4c,) of the channels of patches at each latent, (c,h,w)."""
    height, width = like.shape[-2:]
    return values.to(like).reshape(-1, 2, 2).repeat(1, height // 2, width // 2)


@torch.no_grad()
def reconstruct(vae: Any, pixels: Tensor) -> Tensor:
    """Encode and decode ``pixels`` (B,3,H,W) in [-1,1], without sampling noise."""
    return decode_own(vae, posterior(vae, pixels)[0])


def round_trip(vae: Any, images: np.ndarray) -> np.ndarray:
    """Encode and decode images, uint8 (n,h,w,3), 16 at a time; return the same shape and dtype."""
    outputs = []
    for batch in torch.from_numpy(images).split(16):
        decoded = reconstruct(vae, batch.permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1).clamp(-1, 1)
        outputs.append(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(outputs)
