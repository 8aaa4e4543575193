"""The training loss: denoising plus local control, the edge similarity of z0 and z0' in the mask (arXiv 2602.01991).

    denoising_b = denoising_weight * mean_b( |model output_b - target_b|^2 )
    local_b = weight * w(t_b) * mean_b( |F(z0'_b) - F(z0_b)|^2 * m_b )

F is the filter, w the schedule and m the mask on the grid of the latents. With ``edges`` the local term compares
conditions instead, as ControlNet++ (arXiv 2404.07987) does where noise is low: the edges of the decoded z0' with those
of the condition, by the F1 score of boundaries (:func:`edge_loss`). Every term is per sample, (B,), because a
masked mean over the batch would depend on the number of processes. Reduce once, at the end: ``terms.total.mean()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.filters import laplacian
from torch import Tensor

from localctl.devices import send
from localctl.diffusion import FLOW, DiffusionSample, flow_alpha_bar, gather_alpha_bar, predict_x0, training_target
from localctl.masks import resize_mask
from localctl.settings import ConditionConfig, LossConfig

Decode = Callable[[Tensor], Tensor]  # from scaled latents (B,c,h,w) to pixels (B,3,H,W) in [-1,1]
_LUMA = (0.299, 0.587, 0.114)  # as cv2's COLOR_RGB2GRAY
_TINY = 1e-6  # keeps gradients of square roots and quotients finite


def sobel(latents: Tensor) -> Tensor:
    """Return the gradient magnitude (B,C,h,w) of ``latents``, bit for bit as ``kornia.filters.sobel``, which copies its
    kernel from the host at each call, and waits for that."""
    across = torch.arange(-1, 2, device=latents.device, dtype=latents.dtype)  # -1, 0, 1
    horizontal = (2 - across.abs())[:, None] * across / 8
    kernel = torch.stack([horizontal, horizontal.T])[:, None]  # (2,1,3,3)
    padded = F.pad(latents.reshape(-1, 1, *latents.shape[-2:]), (1, 1, 1, 1), "replicate")
    gx, gy = F.conv2d(padded, kernel).unflatten(0, latents.shape[:2]).unbind(2)
    return torch.sqrt(gx * gx + gy * gy + 1e-6)  # the epsilon keeps its gradient finite on flat input


FILTERS: dict[str, Callable[[Tensor], Tensor] | None] = {  # of latents
    "none": None,
    "mse": lambda latents: latents,
    "sobel": sobel,
    "laplacian": lambda latents: laplacian(latents, kernel_size=5),
}


@dataclass(frozen=True)
class EdgeTarget:
    """What ``edges`` compares with.

    condition (B,1,H,W): of the kind ``config``, at the size of the decoded pixels. rows (n,) int64: those with a
    weight, on the device of the loss; None = look for them, for which the host waits for a GPU.
    """

    condition: Tensor
    config: ConditionConfig
    decode: Decode
    rows: Tensor | None = None


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


def schedule_weight(
    config: LossConfig, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """Return w(t), (B,) float32, for ``timesteps`` (B,) int64; ``config.weight`` is not included. alphas_cumprod (T,):
    sigma with flow matching."""
    table = flow_alpha_bar(alphas_cumprod) if prediction_type == FLOW else alphas_cumprod
    alpha_bar = gather_alpha_bar(table, timesteps).float()
    if config.schedule == "step_unit":
        return ((timesteps >= config.t_min) & (timesteps <= config.t_max)).float()
    if config.schedule == "time_unit":
        return 1 - alpha_bar
    if config.schedule == "low_noise":
        return (alpha_bar >= config.snr_min * (1 - alpha_bar)).float()
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


def soft_edges(pixels: Tensor, config: ConditionConfig) -> Tensor:
    """Return how certainly each pixel is an edge of the condition ``config``, (B,1,H,W) in [0,1], differentiable.

    ``pixels`` (B,3,H,W) in [-1,1]. For canny a logistic function of the gradient magnitude, one half at the mean of its
    two thresholds, without thinning; for sobel the magnitude on that condition's own scale.
    """
    values = pixels / 2 + 0.5
    if config.channels_used == "gray" or config.kind == "sobel":
        luma = send(torch.tensor(_LUMA, dtype=values.dtype), values.device)
        values = (values * luma[:, None, None]).sum(dim=1, keepdim=True)
    strength = 8 * sobel(values).amax(dim=1, keepdim=True)  # of a kernel with the weights 1, 2, 1
    if config.kind == "sobel":
        return (strength / 4).clamp(max=1)
    middle, width = (config.low + config.high) / 2 / 255, max(config.high - config.low, 1) / 4 / 255
    return torch.sigmoid((strength - middle) / width)


def edge_loss(edges: Tensor, wanted: Tensor, mask: Tensor, tolerances: Sequence[int]) -> Tensor:
    """Return 1 - F1 (B,) of ``edges`` against ``wanted`` inside ``mask``, the mean over the tolerances in pixels.

    All (B,1,H,W) in [0,1]. Precision is the share of the edges with a wanted one within the tolerance (in rows and
    columns), recall that of the wanted ones with an edge within it; a differentiable form of the score of boundaries
    (arXiv 1905.07852). 0 with zero gradient without any wanted edge inside the mask.
    """

    def share(of: Tensor, near: Tensor) -> Tensor:
        inside = (of * mask).flatten(1)
        return (inside * near.flatten(1)).sum(dim=1) / (inside.sum(dim=1) + _TINY)

    total = edges.new_zeros(len(edges))
    for tolerance in tolerances:
        reached, near = (F.max_pool2d(item, 2 * tolerance + 1, 1, tolerance) for item in (edges, wanted))
        precision, recall = share(edges, near), share(wanted, reached)
        total = total + 1 - 2 * precision * recall / (precision + recall + _TINY)
    return total / len(tolerances) * ((wanted * mask).flatten(1).sum(dim=1) > 0)


def _local_edges(predicted: Tensor, weight: Tensor, mask: Tensor, target: EdgeTarget, config: LossConfig) -> Tensor:
    """Return :func:`edge_loss` (B,) of the decoded ``predicted`` z0'; 0 where ``weight`` (B,) is 0, undecoded."""
    rows = weight.nonzero()[:, 0] if target.rows is None else target.rows
    found = predicted.new_zeros(len(predicted))
    if not len(rows):
        return found
    inside = mask[rows].float()
    if config.margin:
        inside = -F.max_pool2d(-inside, 2 * config.margin + 1, 1, config.margin)
    edges = soft_edges(target.decode(predicted[rows]).float(), target.config)
    return found.index_put((rows,), edge_loss(edges, target.condition[rows].float(), inside, config.tolerances))


def _masked_error(found: Tensor, wanted: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """Return the mean (B,) of the squared difference (B,C,h,w) under ``mask`` (B,1,H,W), by the settings ``config``."""
    error = (found - wanted).square()
    small = resize_mask(mask.to(error), (error.shape[-2], error.shape[-1]), config.mask_resize)
    return masked_mean(error, small.square() if config.squared_mask else small, config.normalise)


def _denoising(found: Tensor, wanted: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """Return the mean (B,) of the squared error (B,C,h,w), by the settings inside ``mask`` (B,1,H,W) alone, or weighted
    there."""
    if config.mask_denoising:
        return _masked_error(found, wanted, mask, config)
    error = (found - wanted).square()
    if config.masked_denoising_weight == 1:
        return error.flatten(1).mean(dim=1)
    small = resize_mask(mask.to(error), (error.shape[-2], error.shape[-1]), config.mask_resize)
    return masked_mean(error, 1 + (config.masked_denoising_weight - 1) * small, "mask")


def local_control_loss(
    sample: DiffusionSample,
    model_output: Tensor,
    mask: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    config: LossConfig,
    target: EdgeTarget | None = None,
) -> LossTerms:
    """Compute the denoising and local terms of one batch, in float32 for any dtype of the inputs.

    Args:
        sample: the noised batch, latents (B,C,h,w).
        model_output: (B,C,h,w), of the kind ``prediction_type``.
        mask: (B,1,H,W) in [0,1] at pixel resolution (or any other), 1 = controlled.
        alphas_cumprod: (T,) of the training scheduler; sigma with flow matching.
        prediction_type: one of ``diffusion.PREDICTION_TYPES``, or ``diffusion.FLOW``.
        target: for the filter ``edges`` alone, which needs the mask at pixel resolution.

    Raises:
        ValueError: a mask of the wrong shape or an unknown prediction type.
    """
    batch = sample.latents.shape[0]
    if mask.ndim != 4 or mask.shape[0] != batch or mask.shape[1] != 1:
        raise ValueError(f"The mask must have shape ({batch}, 1, H, W) like its batch, not {tuple(mask.shape)}.")
    assert model_output.shape == sample.latents.shape
    # Under autocast the filters' convolutions would run in half precision, where squared edges overflow.
    with torch.autocast(sample.latents.device.type, enabled=False):
        wanted = training_target(sample, alphas_cumprod, prediction_type).float()
        denoising = config.denoising_weight * _denoising(model_output.float(), wanted, mask, config)  # (B,)
        predicted_x0 = predict_x0(
            sample.noisy.float(), model_output.float(), sample.timesteps, alphas_cumprod, prediction_type
        )
        if config.filter == "none":
            local_raw = local = torch.zeros_like(denoising)
        else:
            scheduled = schedule_weight(config, sample.timesteps, alphas_cumprod, prediction_type)
            edges = FILTERS.get(config.filter)
            if edges is None:
                assert target is not None, "edges need a condition and a decoder"
                local_raw = _local_edges(predicted_x0, scheduled, mask, target, config)
            else:
                # The filtered maps are masked, because masking before the filter would make the mask's border an edge.
                local_raw = _masked_error(edges(predicted_x0), edges(sample.latents.float()), mask, config)
            local = config.weight * scheduled * local_raw
    return LossTerms(denoising=denoising, local=local, local_raw=local_raw, predicted_x0=predicted_x0)
