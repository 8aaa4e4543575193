"""One training step: draws keyed by sample, then pixels -> latents -> U-Net with the adapter's features -> loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from localctl.data.sample import Batch
from localctl.diffusion import add_noise, timesteps_from_uniform
from localctl.losses import LossTerms, local_control_loss
from localctl.seeding import generator, noise
from localctl.training.models import Models
from localctl.training.settings import TrainSettings


@dataclass(frozen=True)
class Draws:
    """What chance decides in a step, one row per sample.

    posterior (B,c,h,w): noise of the VAE's latents. noise (B,c,h,w): of the diffusion. uniform (B,) float64 in [0,1):
    becomes the timestep. empty_prompt (B,) bool: the caption is dropped.
    """

    posterior: Tensor
    noise: Tensor
    uniform: Tensor
    empty_prompt: Tensor

    def to(self, device: torch.device | str) -> Draws:
        """The same draws on ``device``."""
        return Draws(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def draw(batch: Batch, latent_shape: tuple[int, int, int], settings: TrainSettings) -> Draws:
    """The draws of ``batch``, keyed by (seed, what for, epoch, key of the sample): the same whatever else is in the
    batch, whoever computes it, and after any resume."""
    visits = list(zip(batch.epochs, batch.keys, strict=True))
    seed = settings.seed

    def normal(purpose: str) -> Tensor:
        return torch.stack([noise(latent_shape, seed, purpose, *visit) for visit in visits])

    def uniform(purpose: str) -> Tensor:
        numbers = [torch.rand((), generator=generator(seed, purpose, *visit), dtype=torch.float64) for visit in visits]
        return torch.stack(numbers)

    return Draws(
        posterior=normal("posterior"),
        noise=normal("noise"),
        uniform=uniform("timestep"),
        empty_prompt=uniform("empty prompt") < settings.proportion_empty_prompts,
    )


@dataclass(frozen=True)
class StepOutput:
    """loss: what to differentiate, the mean of ``terms.total`` over the batch. timesteps (B,) int64. feature_mean,
    feature_var (B,levels): of the adapter's features of each sample, before the mask."""

    loss: Tensor
    terms: LossTerms
    timesteps: Tensor
    feature_mean: Tensor
    feature_var: Tensor


def training_step(batch: Batch, models: Models, settings: TrainSettings, draws: Draws) -> StepOutput:
    """The loss of ``batch`` under ``draws``, a pure function of its arguments; all tensors on the models' device.

    Only the adapter gets gradients, and they reach it through the frozen U-Net.
    """
    latents = models.encode(batch, draws.posterior)  # (B,c,h,w)
    timesteps = timesteps_from_uniform(draws.uniform, models.num_train_timesteps, settings.timestep_sampling)
    sample = add_noise(latents, draws.noise, timesteps, models.alphas_cumprod)
    dropped = draws.empty_prompt.tolist()
    captions = ["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)]
    with _statistics(models.plain_adapter.adapter) as statistics:
        features = models.adapter(torch.cat([batch.condition, batch.mask], dim=1))  # one (B,c_i,h_i,w_i) per level
    feature_var, feature_mean = (torch.stack(column, dim=1) for column in zip(*statistics, strict=True))
    # As while sampling: wholly in its own dtype, where autocast would keep activations in float32.
    with torch.autocast(latents.device.type, enabled=False):
        output = models.unet(
            sample.noisy.to(models.dtype),
            timesteps,
            **models.unet_arguments(captions, batch),
            down_intrablock_additional_residuals=[feature.to(models.dtype) for feature in features],  # U-Net pops it
        ).sample
    terms = local_control_loss(sample, output, batch.mask, models.alphas_cumprod, models.prediction_type, settings.loss)
    return StepOutput(terms.total.mean(), terms, timesteps, feature_mean, feature_var)


@contextmanager
def _statistics(adapter: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gathers (variance, mean) (B,) each of every feature that ``adapter`` makes meanwhile, as published before the
    mask: with it, they would tell of the masks' areas. The adapter may run inside a wrapper of several processes."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, arguments: Any, features: list[Tensor]) -> None:
        found.extend(torch.var_mean(feature.detach().float().flatten(1), dim=1, correction=0) for feature in features)

    hook = adapter.register_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()
