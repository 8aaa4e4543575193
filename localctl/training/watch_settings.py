"""What the watching of a training can be told: validation, early stopping, and the name of the run for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from localctl.bases import SchedulerName
from localctl.records import NotNegative, Positive, Rate, Share, record


@record("validation")
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

    count: Positive = 16
    rows: Positive = 6
    batch_size: Positive = 8
    num_inference_steps: Positive = 20
    guidance_scale: float | None = None
    scheduler: SchedulerName = "ddim"
    seed: int = 0
    proportion_empty_prompts: Share = 0.0


@record("early_stopping")
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

    every: NotNegative = 0
    patience: Positive = 3
    min_delta: Rate = 0.0
    lower_is_better: bool = True
    metric: str | None = None
    weights: str | None = None
    reference: str | None = None
    num_images: Annotated[int, Field(ge=2)] = 2048
    batch_size: Positive = 8
    num_inference_steps: Positive = 30
    guidance_scale: float | None = None
    scheduler: SchedulerName = "ddim"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric is not None and not self.lower_is_better:
            raise ValueError(f"early_stopping.metric={self.metric} is a distance; leave lower_is_better=true.")


@record("wandb")
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
