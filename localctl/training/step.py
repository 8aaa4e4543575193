"""One training step: noise keyed by sample, then pixels -> latents -> U-Net with the adapter's features -> loss.

And what steps measure, gathered until the next row of the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from localctl.data.sample import Batch
from localctl.diffusion import add_noise, timesteps_from_uniform
from localctl.losses import LossTerms, local_control_loss
from localctl.seeding import generator, noise
from localctl.training.models import Models
from localctl.training.settings import TrainSettings

BUCKETS = 10
_TERMS = ("denoising", "local", "local_raw")
_GATHERED = ("timesteps", *_TERMS, "feature_mean", "feature_var")  # of each sample; the last two, and level


@dataclass(frozen=True)
class StepNoise:
    """What is random in a step, one row per sample.

    posterior (B,c,h,w): noise of the VAE's latents. noise (B,c,h,w): of the diffusion. uniform (B,) float64 in [0,1):
    becomes the timestep. empty_prompt (B,) bool: the caption is dropped.
    """

    posterior: Tensor
    noise: Tensor
    uniform: Tensor
    empty_prompt: Tensor

    def to(self, device: torch.device | str) -> StepNoise:
        """Move to ``device``."""
        return StepNoise(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


def sample_noise(batch: Batch, latent_shape: tuple[int, int, int], settings: TrainSettings) -> StepNoise:
    """Sample what is random in a step of ``batch``, keyed by (seed, what for, epoch, key of the sample): the same
    whatever else is in the batch, whoever computes it, and after any resume."""
    visits = list(zip(batch.epochs, batch.keys, strict=True))
    seed = settings.seed

    def normal(purpose: str) -> Tensor:
        return torch.stack([noise(latent_shape, seed, purpose, *visit) for visit in visits])

    def uniform(purpose: str) -> Tensor:
        numbers = [torch.rand((), generator=generator(seed, purpose, *visit), dtype=torch.float64) for visit in visits]
        return torch.stack(numbers)

    return StepNoise(
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


def training_step(batch: Batch, models: Models, settings: TrainSettings, sampled: StepNoise) -> StepOutput:
    """Return the loss of ``batch`` under ``sampled``, a pure function of its arguments; all tensors on the models'
    device.

    Only the adapter gets gradients, and they reach it through the frozen U-Net.
    """
    latents = models.encode(batch, sampled.posterior)  # (B,c,h,w)
    timesteps = timesteps_from_uniform(sampled.uniform, models.num_train_timesteps, settings.timestep_sampling)
    sample = add_noise(latents, sampled.noise, timesteps, models.alphas_cumprod)
    dropped = sampled.empty_prompt.tolist()
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


@dataclass
class StepStats:
    """Per-sample terms and times since the last row. Tensors stay where they are until a row is asked for, so that
    logging does not make a GPU wait at every step."""

    terms: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in _GATHERED})
    samples: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def add(self, output: StepOutput) -> None:
        """Take in one micro-batch."""
        terms = output.terms
        measured = (terms.denoising, terms.local, terms.local_raw)
        values = (output.timesteps, *measured, output.feature_mean, output.feature_var)
        for name, value in zip(_GATHERED, values, strict=True):
            self.terms[name].append(value.detach())

    def add_time(self, samples: int, seconds: float, waiting: float) -> None:
        """Note that ``samples`` of all processes took ``seconds``, of which ``waiting`` for data. Whole steps only:
        images for validation and checkpoints are not counted."""
        self.samples += samples
        self.seconds += seconds
        self.waiting += waiting

    def row(self, num_train_timesteps: int, gather: Any) -> dict[str, Any]:
        """Return the row for the log, over the samples of all processes, which ``gather`` brings together; then empty.

        Means of the terms, the unweighted local term and the denoising term per tenth of the timesteps (None where no
        sample fell), mean and standard deviation of the adapter's features per level, before the mask, samples per
        second, and the share of time spent waiting for data.
        """
        terms = {name: gather(torch.cat(parts)).cpu().double() for name, parts in self.terms.items()}
        mean, var = terms["feature_mean"], terms["feature_var"]  # (n,levels)
        std = (var.mean(dim=0) + mean.var(dim=0, correction=0)).sqrt()  # within the samples, and between them
        buckets = terms["timesteps"].long() * BUCKETS // num_train_timesteps
        row = {
            "loss": (terms["denoising"] + terms["local"]).mean().item(),
            **{name: terms[name].mean().item() for name in _TERMS},
            "local_raw_by_timestep": bucket_means(terms["local_raw"], buckets),
            "denoising_by_timestep": bucket_means(terms["denoising"], buckets),
            "feature_mean_by_level": mean.mean(dim=0).tolist(),
            "feature_std_by_level": std.tolist(),
            "images_per_second": self.samples / self.seconds if self.seconds else None,
            "data_wait_share": self.waiting / self.seconds if self.seconds else None,
        }
        self.__init__()  # type: ignore[misc]
        return row

    def state_dict(self, gather: Any = lambda tensor: tensor) -> dict[str, Any]:
        """As plain numbers, exactly; of all processes, one after the other, which ``gather`` brings together."""
        terms = {name: gather(torch.cat(parts)).tolist() if parts else [] for name, parts in self.terms.items()}
        return {"terms": terms, "samples": self.samples, "seconds": self.seconds, "waiting": self.waiting}

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], device: torch.device | str = "cpu", *, rank: int = 0, world_size: int = 1
    ) -> StepStats:
        """Return the inverse of :meth:`state_dict`: the part of process ``rank`` of ``world_size``. Empty where there
        is no such part: after a change of the number of processes, or with what an earlier version gathered.

        ``device``: where the coming steps will leave theirs.
        """
        count = len(state["terms"]["timesteps"])
        known = all(len(state["terms"].get(name, ())) == count for name in _GATHERED)
        if count % world_size or not known:  # earlier versions did not gather all of it
            return cls()
        mine = slice(rank * count // world_size, (rank + 1) * count // world_size)
        terms: dict[str, list[Tensor]] = {name: [] for name in _GATHERED}
        for name, values in state["terms"].items():
            kind = torch.int64 if name == "timesteps" else torch.float32
            if values:
                terms[name].append(torch.tensor(values[mine], dtype=kind, device=device))
        return cls(terms, state["samples"], state["seconds"], state["waiting"])


def bucket_means(values: Tensor, buckets: Tensor) -> Sequence[float | None]:
    """Mean of ``values`` (n,) in each of the buckets (n,) int64; None for an empty one."""
    chosen = [values[buckets == bucket] for bucket in range(BUCKETS)]
    return [part.mean().item() if len(part) else None for part in chosen]
