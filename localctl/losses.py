"""The training loss: denoising plus local control, the edge similarity of z0 and z0' in the mask (arXiv 2602.01991).

    denoising_b = denoising_weight * mean_b( |model output_b - target_b|^2 )
    local_b = weight * w(t_b) * mean_b( |F(z0'_b) - F(z0_b)|^2 * m_b )

F is the filter, w the schedule and m the mask on the grid of the latents. Every term is per sample, (B,), because a
masked mean over the batch would depend on the number of processes. Reduce once, at the end: ``terms.total.mean()``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.filters import laplacian
from torch import Tensor

from localctl.diffusion import FLOW, DiffusionSample, flow_alpha_bar, gather_alpha_bar, predict_x0, training_target
from localctl.masks import resize_mask
from localctl.settings import LossConfig


def sobel(latents: Tensor) -> Tensor:
    """Return the gradient magnitude (B,C,h,w) of ``latents``, bit for bit as ``kornia.filters.sobel``, which copies its
    kernel from the host at each call, and waits for that."""
    across = torch.arange(-1, 2, device=latents.device, dtype=latents.dtype)  # -1, 0, 1
    horizontal = (2 - across.abs())[:, None] * across / 8
    kernel = torch.stack([horizontal, horizontal.T])[:, None]  # (2,1,3,3)
    padded = F.pad(latents.reshape(-1, 1, *latents.shape[-2:]), (1, 1, 1, 1), "replicate")
    gx, gy = F.conv2d(padded, kernel).unflatten(0, latents.shape[:2]).unbind(2)
    return torch.sqrt(gx * gx + gy * gy + 1e-6)  # the epsilon keeps its gradient finite on flat input


FILTERS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "mse": lambda latents: latents,
    "sobel": sobel,
    "laplacian": lambda latents: laplacian(latents, kernel_size=5),
}


@dataclass(frozen=True)
class LossTerms:
    """Per-sample terms, float32.

    denoising (B,): mean squared error of the model output, with its weight applied.
    local (B,): the local term, with weight and schedule applied.
    local_raw (B,): the local term without weight and schedule, for logs.
    predicted_x0 (B,C,h,w): z0', with gradients.
    """

    denoising: Tensor
    local: Tensor
    local_raw: Tensor
    predicted_x0: Tensor

    @property
    def total(self) -> Tensor:
        """The sum denoising + local, (B,)."""
        return self.denoising + self.local


def schedule_weight(config: LossConfig, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return w(t), (B,) float32, for ``timesteps`` (B,) int64; ``config.weight`` is not included."""
    alpha_bar = gather_alpha_bar(alphas_cumprod, timesteps).float()
    if config.schedule == "step_unit":
        return ((timesteps >= config.t_min) & (timesteps <= config.t_max)).float()
    if config.schedule == "time_unit":
        return 1 - alpha_bar
    if config.schedule == "snr":
        return (alpha_bar / (1 - alpha_bar)).clamp(max=config.snr_cap)
    return torch.ones_like(alpha_bar)


def masked_mean(error: Tensor, mask: Tensor, normalise: str) -> Tensor:
    """Return the mean (B,) of ``error`` (B,C,h,w) under ``mask`` (B,1,h,w), per sample.

    ``map`` divides the masked sum by C h w, ``mask`` by C sum(mask); an empty mask gives 0 with zero gradient.
    """
    masked = (error * mask).mean(dim=1).flatten(1)  # (B,h*w)
    if normalise == "map":
        return masked.mean(dim=1)
    area = mask.flatten(1).sum(dim=1)
    return masked.sum(dim=1) / torch.where(area > 0, area, 1.0)


def _masked_error(found: Tensor, wanted: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """Return the mean (B,) of the squared difference (B,C,h,w) under ``mask`` (B,1,H,W), by the settings ``config``."""
    error = (found - wanted).square()
    small = resize_mask(mask.to(error), (error.shape[-2], error.shape[-1]), config.mask_resize)
    return masked_mean(error, small.square() if config.squared_mask else small, config.normalise)


def local_control_loss(
    sample: DiffusionSample,
    model_output: Tensor,
    mask: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    config: LossConfig,
) -> LossTerms:
    """Compute the denoising and local terms of one batch, in float32 for any dtype of the inputs.

    Args:
        sample: the noised batch, latents (B,C,h,w).
        model_output: (B,C,h,w), of the kind ``prediction_type``.
        mask: (B,1,H,W) in [0,1] at pixel resolution (or any other), 1 = controlled.
        alphas_cumprod: (T,) of the training scheduler; sigma with flow matching.
        prediction_type: one of ``diffusion.PREDICTION_TYPES``, or ``diffusion.FLOW``.

    Raises:
        ValueError: a mask of the wrong shape or an unknown prediction type.
    """
    batch = sample.latents.shape[0]
    if mask.ndim != 4 or mask.shape[0] != batch or mask.shape[1] != 1:
        raise ValueError(f"The mask must have shape ({batch}, 1, H, W) like its batch, not {tuple(mask.shape)}.")
    assert model_output.shape == sample.latents.shape
    # Under autocast the filters' convolutions would run in half precision, where squared edges overflow.
    with torch.autocast(sample.latents.device.type, enabled=False):
        target = training_target(sample, alphas_cumprod, prediction_type).float()
        if config.mask_denoising:
            denoising = _masked_error(model_output.float(), target, mask, config)  # (B,)
        else:
            denoising = (model_output.float() - target).square().flatten(1).mean(dim=1)
        denoising = config.denoising_weight * denoising
        predicted_x0 = predict_x0(
            sample.noisy.float(), model_output.float(), sample.timesteps, alphas_cumprod, prediction_type
        )
        edges = FILTERS[config.filter]
        if edges is None:
            local_raw = local = torch.zeros_like(denoising)
        else:
            # The filtered maps are masked, because masking before the filter would make the mask's border an edge.
            local_raw = _masked_error(edges(predicted_x0), edges(sample.latents.float()), mask, config)
            table = flow_alpha_bar(alphas_cumprod) if prediction_type == FLOW else alphas_cumprod
            local = config.weight * schedule_weight(config, sample.timesteps, table) * local_raw
    return LossTerms(denoising=denoising, local=local, local_raw=local_raw, predicted_x0=predicted_x0)
