"""One training step: noise keyed by sample, then pixels -> latents -> U-Net with the adapter's features -> loss; and
the statistics of the steps since the last row of the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localctl.data.sample import Batch
from localctl.devices import send
from localctl.diffusion import DiffusionSample, add_noise, decode, timesteps_from_uniform
from localctl.losses import EdgeTarget, LossTerms, local_control_loss, schedule_weight
from localctl.seeding import generator, noise
from localctl.training.halves import mean_loss
from localctl.training.models import Models
from localctl.training.settings import TrainSettings

BUCKETS = 10
_TERMS = ("denoising", "local", "local_raw")
_GATHERED = ("timesteps", *_TERMS, "feature_mean", "feature_var")  # (n,) each; the last two (n,levels)


@dataclass(frozen=True)
class StepNoise:
    """The random numbers of a step, one row per sample.

    posterior (B,c,h,w): noise for sampling the VAE's posterior. noise (B,c,h,w): noise of the diffusion. uniform (B,)
    float64 in [0,1): mapped to the timestep. empty_prompt (B,) bool: train without the caption.
    """

    posterior: Tensor
    noise: Tensor
    uniform: Tensor
    empty_prompt: Tensor

    def to(self, device: torch.device | str) -> StepNoise:
        """Move the noise to ``device`` without waiting. Captions and timesteps are chosen on the host."""
        posterior, noise = send(torch.stack([self.posterior, self.noise]), device)
        return StepNoise(posterior, noise, self.uniform, self.empty_prompt)


def sample_noise(batch: Batch, latent_shape: tuple[int, int, int], settings: TrainSettings) -> StepNoise:
    """Sample the random numbers of a step, keyed by (seed, purpose, epoch, key of the sample): they do not depend on
    the rest of the batch, on the process, or on a resume."""
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
    """The loss of a step and its parts.

    loss: the mean of ``terms.total`` over the batch, to be differentiated; ``terms`` may have no gradients. timesteps:
        (B,) int64. feature_mean, feature_var: (B,levels), of the adapter's features before the mask.
    """

    loss: Tensor
    terms: LossTerms
    timesteps: Tensor
    feature_mean: Tensor
    feature_var: Tensor


def training_step(batch: Batch, models: Models, settings: TrainSettings, sampled: StepNoise) -> StepOutput:
    """Compute the loss of ``batch`` with the random numbers ``sampled``, as a pure function of the arguments, which
    :meth:`Batch.to` and :meth:`StepNoise.to` bring to the models' device.

    Only the adapter gets gradients, which flow through the frozen denoiser.
    """
    latents = models.encode(batch, sampled.posterior)  # (B,c,h,w)
    assert settings.timestep_sampling is not None  # the settings have replaced null
    chosen = timesteps_from_uniform(
        sampled.uniform,
        models.num_train_timesteps,
        settings.timestep_sampling,
        settings.logit_mean,
        settings.logit_std,
        settings.timestep_range,
    )
    timesteps = send(chosen, latents.device)
    height, width = batch.pixels.shape[-2:]
    size = height, width
    table = models.noise_table(size)
    sample = add_noise(latents, sampled.noise, timesteps, table, models.prediction_type)
    with _statistics(models.plain_adapter.adapter) as statistics:
        features = models.adapter(models.adapter_inputs(batch.condition, batch.mask))  # one (B,c_i,h_i,w_i) per level
    feature_var, feature_mean = (torch.stack(column, dim=1) for column in zip(*statistics, strict=True))
    conditioning = models.conditioning(batch, sampled.empty_prompt.tolist())

    def compute(rows: slice, some: list[Tensor]) -> LossTerms:
        part = DiffusionSample(latents[rows], sampled.noise[rows], sample.noisy[rows], timesteps[rows])
        target = _edge_target(models, settings, batch.condition[rows], chosen[rows], size)
        # In its own dtype throughout, as while sampling: autocast would keep some activations in float32.
        with torch.autocast(latents.device.type, enabled=False):
            output = models.output(
                part.noisy, models.denoiser.times(part.timesteps, table), conditioning.rows(rows), some
            )
        mask = batch.mask[rows]
        return local_control_loss(part, output, mask, table, models.prediction_type, settings.loss, target)

    whole = settings.compile or not models.denoiser.in_halves  # two threads would compile at once
    loss, terms = mean_loss(compute, features, whole=whole)
    return StepOutput(loss, terms, timesteps, feature_mean, feature_var)


def _edge_target(
    models: Models, settings: TrainSettings, condition: Tensor, timesteps: Tensor, size: tuple[int, int]
) -> EdgeTarget | None:
    """Return what ``loss=edges`` compares with, for ``timesteps`` on the host, which chooses the rows: it would wait
    for those that a GPU finds. None for the other losses."""
    if settings.loss.filter != "edges":
        return None
    table = models.noise_table(size, on_host=True)
    rows = schedule_weight(settings.loss, timesteps, table, models.prediction_type).nonzero()[:, 0]
    return EdgeTarget(condition, settings.condition, partial(decode, models.vae), send(rows, condition.device))


@contextmanager
def _statistics(adapter: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, collect (variance, mean), (B,) each, of every feature map of ``adapter``. As published, they are taken
    before the mask; after it they would depend on its area. A hook also works in the wrapper of several processes."""
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
    """Per-sample loss terms and times since the last row of the log. Tensors stay on their device until a row is
    computed, so that logging does not synchronize the GPU at every step."""

    terms: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in _GATHERED})
    samples: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def add(self, output: StepOutput) -> None:
        """Add one micro-batch."""
        terms = output.terms
        measured = (terms.denoising, terms.local, terms.local_raw)
        values = (output.timesteps, *measured, output.feature_mean, output.feature_var)
        for name, value in zip(_GATHERED, values, strict=True):
            self.terms[name].append(value.detach())

    def add_time(self, samples: int, seconds: float, waiting: float) -> None:
        """Add the time of a step: ``samples`` of all processes took ``seconds``, ``waiting`` of them for data.
        Validations and checkpoints are not counted."""
        self.samples += samples
        self.seconds += seconds
        self.waiting += waiting

    def row(self, num_train_timesteps: int, gather: Any) -> dict[str, Any]:
        """Return the row for the log over the samples of all processes (``gather`` concatenates them), and start anew.

        Means of the terms, the unweighted local term and the denoising term per tenth of the timesteps (None for a
        tenth without samples), mean and standard deviation of the adapter's features per level, before the mask,
        samples per second, and the share of time spent waiting for data.
        """
        terms = {name: gather(torch.cat(parts)).cpu().double() for name, parts in self.terms.items()}
        mean, var = terms["feature_mean"], terms["feature_var"]  # (n,levels)
        std = (var.mean(dim=0) + mean.var(dim=0, correction=0)).sqrt()  # variance within the samples and between them
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
        """Return exact plain numbers of all processes, one after the other, as ``gather`` concatenates them."""
        terms = {name: gather(torch.cat(parts)).tolist() if parts else [] for name, parts in self.terms.items()}
        return {"terms": terms, "samples": self.samples, "seconds": self.seconds, "waiting": self.waiting}

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], device: torch.device | str = "cpu", *, rank: int = 0, world_size: int = 1
    ) -> StepStats:
        """Restore the part of process ``rank`` of ``world_size`` from :meth:`state_dict`. It is empty if the number of
        processes has changed or an earlier version recorded less.

        ``device``: where the tensors of the coming steps are.
        """
        count = len(state["terms"]["timesteps"])
        known = all(len(state["terms"].get(name, ())) == count for name in _GATHERED)
        if count % world_size or not known:  # earlier versions did not record all of it
            return cls()
        mine = slice(rank * count // world_size, (rank + 1) * count // world_size)
        terms: dict[str, list[Tensor]] = {name: [] for name in _GATHERED}
        for name, values in state["terms"].items():
            kind = torch.int64 if name == "timesteps" else torch.float32
            if values:
                terms[name].append(torch.tensor(values[mine], dtype=kind, device=device))
        return cls(terms, state["samples"], state["seconds"], state["waiting"])


def bucket_means(values: Tensor, buckets: Tensor) -> Sequence[float | None]:
    """Return the mean of ``values`` (n,) in each bucket; ``buckets`` (n,) int64 assigns them. None for an empty one."""
    chosen = [values[buckets == bucket] for bucket in range(BUCKETS)]
    return [part.mean().item() if len(part) else None for part in chosen]
