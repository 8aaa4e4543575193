"""What the watching of a training can be told: validation, early stopping, and the name of the run for others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localctl.bases import SCHEDULERS


def choose(what: str, value: str | None, known: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"Unknown {what} {value!r}; choose one of {', '.join(known)}.")


def at_least(what: str, value: float, least: float) -> None:
    """ValueError unless ``value`` is finite and not below ``least``."""
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{what} must be at least {least}, not {value}.")


def check_share(what: str, value: float) -> None:
    """ValueError unless ``value`` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{what} must lie in [0, 1], not {value}.")


@dataclass(kw_only=True)
class ValidationConfig:
    """Pictures of held-out scenes with fixed prompts, masks and noise; the rest as for the pipeline.

    count: how many are drawn and scored.
    rows: how many of them the grid shows.
    batch_size: pictures drawn at once; does not change them.
    num_inference_steps: sampling steps of each.
    guidance_scale: of classifier-free guidance; null = the base's own.
    scheduler: ddim, ddpm, pndm, lms, euler, euler_ancestral, heun, dpmpp_2m or unipc.
    seed: of the noise.
    proportion_empty_prompts: this share of them, always the same ones, is generated without its caption: what the
        adapter does alone.
    """

    count: int = 16
    rows: int = 6
    batch_size: int = 8
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    scheduler: str = "ddim"
    seed: int = 0
    proportion_empty_prompts: float = 0.0

    def __post_init__(self) -> None:
        for name in ("count", "rows", "batch_size", "num_inference_steps"):
            at_least(f"validation.{name}", getattr(self, name), 1)
        check_share("validation.proportion_empty_prompts", self.proportion_empty_prompts)
        choose("validation.scheduler", self.scheduler, tuple(SCHEDULERS))


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """When to stop for a score: one that the caller of the training gives (``events.Scorer``), or ``metric``.

    every: steps between scores, 0 = never.
    patience: stop after this many scores in a row that beat the best by no more than min_delta.
    min_delta: what counts as better than the best.
    lower_is_better: as with FID.
    metric: ``fid`` or ``frechet_EXTRACTOR``, which `train_adapter.py` takes of num_images pictures that the adapter
        draws from held-out examples, always with the same masks and noise; null = none.
    weights: of the extractor, if it needs to be told.
    reference: statistics made by `evaluate_fid.py ref`; null = of the held-out pictures.
    num_images: pictures drawn for each score.
    batch_size: of them drawn at once.
    num_inference_steps: sampling steps of each.
    guidance_scale: of classifier-free guidance; null = the base's own.
    scheduler: ddim, ddpm, pndm, lms, euler, euler_ancestral, heun, dpmpp_2m or unipc.
    seed: of masks and noise.
    """

    every: int = 0
    patience: int = 3
    min_delta: float = 0.0
    lower_is_better: bool = True
    metric: str | None = None
    weights: str | None = None
    reference: str | None = None
    num_images: int = 2048
    batch_size: int = 8
    num_inference_steps: int = 30
    guidance_scale: float | None = None
    scheduler: str = "ddim"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("early_stopping.every", self.every, 0)
        at_least("early_stopping.patience", self.patience, 1)
        at_least("early_stopping.min_delta", self.min_delta, 0)
        for name, least in (("num_images", 2), ("batch_size", 1), ("num_inference_steps", 1)):
            at_least(f"early_stopping.{name}", getattr(self, name), least)
        choose("early_stopping.scheduler", self.scheduler, tuple(SCHEDULERS))
        if self.metric is not None and not self.lower_is_better:
            raise ValueError(f"early_stopping.metric={self.metric} is a distance; leave lower_is_better=true.")


@dataclass(kw_only=True)
class WandbConfig:
    """How the run is called at Weights & Biases, for report_to=wandb.

    project: null = as the variable WANDB_PROJECT says, else ``localctl``.
    name: null = as WANDB_NAME says.
    group: null = as WANDB_RUN_GROUP says.
    tags: like [canny, sd15]; null = as WANDB_TAGS says.
    notes: null = as WANDB_NOTES says.
    job_type: null = as WANDB_JOB_TYPE says.
    """

    project: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] | None = None
    notes: str | None = None
    job_type: str | None = None
