"""Settings for observing a training: validation, early stopping and Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from localctl.bases import SchedulerName
from localctl.records import Finite, NotNegative, Positive, Rate, Share, record


@record("validation")
@dataclass(kw_only=True)
class ValidationConfig:
    """Images of held-out examples with fixed prompts, masks and noise; the other options are the pipeline's.

    count: images to generate and score.
    rows: how many of them the grid shows.
    batch_size: images per batch; does not change them.
    num_inference_steps: sampling steps of each.
    guidance_scale: of classifier-free guidance; null = the base's own.
    unconditional_scale: factor of the adapter's features beside the empty prompt; 0 makes control stronger; null =
        adapter.unconditional_scale.
    control_guidance_scale: a guidance scale of the adapter's own, beside guidance_scale; null = none.
    scheduler: ddim, ddpm, pndm, lms, euler, euler_ancestral, heun, dpmpp_2m, unipc, kdpm2, kdpm2_ancestral,
        dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, dpmpp_2s, dpmpp_sde, deis, sa_solver, lcm or tcd; null = ddim, or euler
        for bases of flow matching.
    seed: of the noise.
    proportion_empty_prompts: this share of them, always the same ones, is generated without its caption, which
        shows the adapter's effect alone.
    """

    count: Positive = 16
    rows: Positive = 6
    batch_size: Positive = 8
    num_inference_steps: Positive = 20
    guidance_scale: Finite | None = None
    unconditional_scale: Finite | None = None
    control_guidance_scale: Finite | None = None
    scheduler: SchedulerName | None = None
    seed: int = 0
    proportion_empty_prompts: Share = 0.0


@record("early_stopping")
@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """When to stop because of a score: that of an ``events.Scorer`` given from Python, or ``metric``.

    every: steps between scores, 0 = never.
    patience: stop after this many scores in a row that beat the best by no more than min_delta.
    min_delta: what counts as better than the best.
    lower_is_better: as with FID.
    metric: ``fid`` or ``frechet_EXTRACTOR`` of num_images images that are generated for held-out examples, always with
        the same masks and noise; null = none.
    weights: of the extractor, if it has no default.
    reference: statistics from `evaluate_fid.py ref`; null = of the held-out images.
    num_images: images generated for each score.
    batch_size: images per batch.
    num_inference_steps: sampling steps of each.
    guidance_scale: of classifier-free guidance; null = the base's own.
    scheduler: ddim, ddpm, pndm, lms, euler, euler_ancestral, heun, dpmpp_2m, unipc, kdpm2, kdpm2_ancestral,
        dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, dpmpp_2s, dpmpp_sde, deis, sa_solver, lcm or tcd; null = ddim, or euler
        for bases of flow matching.
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
    guidance_scale: Finite | None = None
    scheduler: SchedulerName | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric is not None and not self.lower_is_better:
            raise ValueError(f"early_stopping.metric={self.metric} is a distance; leave lower_is_better=true.")


@record("wandb")
@dataclass(kw_only=True)
class WandbConfig:
    """The run at Weights & Biases, for report_to=wandb.

    project: null = the variable WANDB_PROJECT, else ``localctl``.
    name: null = WANDB_NAME.
    group: null = WANDB_RUN_GROUP.
    tags: like [canny, sd15]; null = WANDB_TAGS.
    notes: null = WANDB_NOTES.
    job_type: null = WANDB_JOB_TYPE.
    """

    project: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] | None = None
    notes: str | None = None
    job_type: str | None = None
