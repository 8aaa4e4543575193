"""All settings of a training run, typed and validated. Top-level names are those of diffusers' scripts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from localctl.base_specs import OF_ADAPTER
from localctl.bases import BaseConfig, BaseSpec, SchedulerName, defaults_of
from localctl.cluster import available_cpus
from localctl.data.config import DataConfig
from localctl.records import Decay, Finite, NotNegative, Positive, Rate, Share, record
from localctl.settings import (
    EDGE_CONDITIONS,
    ConditionConfig,
    LossConfig,
    MaskConfig,
    Quantization,
    ReportTo,
    TimestepSampling,
    check_own_guidance,
)
from localctl.training.adapter_settings import MASKING as MASKING
from localctl.training.adapter_settings import AdapterConfig as AdapterConfig
from localctl.training.watch_settings import EarlyStoppingConfig as EarlyStoppingConfig
from localctl.training.watch_settings import ValidationConfig as ValidationConfig
from localctl.training.watch_settings import WandbConfig as WandbConfig

LRScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
LR_SCHEDULERS: tuple[str, ...] = get_args(LRScheduler)
MOST_WORKERS = 4  # by default: one core prepares some 30 photos of 1024 px a second at 512 px
LR_END = 1e-7  # of the polynomial schedule, as in diffusers
ALIASES = {
    "pretrained_model_name_or_path": "base",
    "base.path": "base.name",
    "revision": "base.revision",
    "variant": "base.variant",
    "pretrained_vae_model_name_or_path": "base.vae",
    "dataset_name": "data",
    "dataset_config_name": "data.dataset_config_name",
    "cache_dir": "data.cache_dir",
    "encodings_dir": "data.encodings_dir",
    "train_data_dir": "data.path",
    "image_column": "data.image_column",
    "conditioning_image_column": "data.conditioning_image_column",
    "mask_column": "data.mask_column",
    "caption_column": "data.caption_column",
    "resolution": "data.resolution",
    "aspect_ratio_buckets": "data.aspect_ratio_buckets",
    "center_crop": "data.center_crop",
    "random_flip": "data.random_flip",
    "max_train_samples": "data.count",
    "num_validation_images": "validation.count",
    "tracker_project_name": "wandb.project",
}
FREE_GROUPS = {"base": "base.name", "data": "data.name"}


@record()
@dataclass(kw_only=True)
class TrainSettings:
    """The settings of a training run. ValueError for a value or a combination that cannot work.

    Steps are optimizer updates everywhere.

    adapter_model_name_or_path: continue from this T2IAdapter or LocalAdapter, a folder or hub id; null = a fresh one.
    output_dir: folder for logs, images, checkpoints and the adapter.
    overwrite_output_dir: replace an earlier run in the folder.
    dry_run: only print an estimate of the training's memory and FLOPs.
    seed: of everything random: weights, order, masks, noise, timesteps.
    report_to: tensorboard, wandb, all or none; stats.jsonl is always written.
    push_to_hub: upload the finished adapter with its card.
    hub_model_id: the repository to upload to, OWNER/NAME; null = named like output_dir.
    hub_private_repo: a new repository is private.
    hub_token: null = that of `hf auth login`; it is never written to a file.
    max_train_steps: how long to train, in steps; null = num_train_epochs alone decides.
    num_train_epochs: at most so many passes over the data; with max_train_steps, whichever ends first. One of the two
        may be null.
    train_batch_size: samples per process and micro-batch.
    gradient_accumulation_steps: micro-batches that make a step.
    dataloader_num_workers: processes that prepare samples; 0 = the training process itself; null = 0 for the embedded
        scenes, which stay in memory, and one per core that is left for files, up to 4.
    mixed_precision: no, fp16, bf16, or null for what `accelerate` was configured with; trained weights stay float32.
    gradient_checkpointing: the denoiser recomputes its activations instead of storing them.
    quantization: how the weights of a frozen transformer are stored: bitsandbytes_8bit, bitsandbytes_4bit (NF4) or
        torchao_int8, by diffusers with the package of that name; null = in base.dtype or mixed_precision.
    offload_base: a frozen transformer's weights wait in the host's memory, and come to the device block by block; needs
        gradient_checkpointing.
    allow_tf32: faster float32 on NVIDIA GPUs, less exact.
    compile: torch compiles the repeated blocks of the U-Net and the adapter; the first step of each image size takes
        minutes longer, all others are faster.
    use_8bit_adam: the optimizer's moments in 8 bits, by bitsandbytes.
    use_ema: average the adapter's weights over the steps; the average is validated and exported.
    ema_decay: how much of the average a step keeps.
    cpu_threads: on a CPU; null = torch's own choice (all cores if `accelerate launch` left only one).
    learning_rate: the highest of the schedule.
    lr_scheduler: constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.
    lr_warmup_steps: steps until the highest learning rate.
    lr_num_cycles: of cosine_with_restarts.
    lr_power: of polynomial.
    adam_beta1: AdamW's decay of the mean.
    adam_beta2: AdamW's decay of the square.
    adam_weight_decay: AdamW's pull towards zero.
    adam_epsilon: AdamW's guard against dividing by zero.
    max_grad_norm: gradients are scaled down to this norm; null = they are not.
    proportion_empty_prompts: share of the captions that are replaced by an empty prompt.
    proportion_full_masks: share of the samples whose mask, sampled or of the data, is replaced by one of the whole
        image, in training alone: the features learn more from each image, and are masked when images are generated.
        null = the base's own, 1 for micro, 0 for others; also 0 where the mask is more than a factor of the features
        (adapter.mask_condition, loss.mask_denoising, loss.masked_denoising_weight).
    timestep_sampling: distribution of the timesteps: uniform; cubic, which prefers noisy ones as published; or
        logit_normal, which prefers those in the middle; null = the base's own, uniform for micro and pixart,
        logit_normal for flow matching and cubic for others.
    logit_mean: of logit_normal; above 0 = noisier.
    logit_std: of logit_normal.
    timestep_range: the timesteps sampled, as a part of all: [0, 1] = all, [0.2, 0.8] = none of the ends.
    flow_shift: of bases of flow matching, how far noise levels are moved towards noise; null = as the base's scheduler
        moves them, for each size of image.
    distilled_guidance: the guidance scale that FLUX.1 dev takes as an input; null = 3.5.
    max_sequence_length: the most tokens of a caption that a transformer reads; null = as many as its pipeline does.
    logging_steps: steps between rows of the log.
    validation_steps: steps between validations; 0 = none.
    checkpointing_steps: steps between checkpoints; 0 = none.
    checkpoints_total_limit: how many checkpoints are kept; null = all; at least 2, as a single one may turn out
        damaged.
    resume_from_checkpoint: `latest` or the path of a checkpoint.
    force_resume: continue even if settings, data or the number of processes changed (docs/reliability.md).
    max_nonfinite_steps: so many updates may be skipped because they are not finite; one more stops the run.
    """

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    adapter_model_name_or_path: str | None = None
    output_dir: str = "outputs/adapter"
    overwrite_output_dir: bool = False
    dry_run: bool = False
    seed: int = 0
    report_to: ReportTo = "tensorboard"

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private_repo: bool = True

    max_train_steps: Positive | None = 700
    num_train_epochs: Positive | None = None
    train_batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    dataloader_num_workers: NotNegative | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    gradient_checkpointing: bool = False
    quantization: Quantization | None = None
    offload_base: bool = False
    allow_tf32: bool = False
    compile: bool = False
    use_8bit_adam: bool = False
    use_ema: bool = False
    ema_decay: Decay = 0.9999
    cpu_threads: Positive | None = None

    learning_rate: Rate = 3e-3
    lr_scheduler: LRScheduler = "cosine"
    lr_warmup_steps: NotNegative = 50
    lr_num_cycles: Positive = 1
    lr_power: Rate = 1.0
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_weight_decay: Rate = 1e-2
    adam_epsilon: Rate = 1e-8
    max_grad_norm: float | None = 1.0
    proportion_empty_prompts: Share = 0.1
    proportion_full_masks: Share | None = None
    timestep_sampling: TimestepSampling | None = None
    logit_mean: Finite = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    timestep_range: tuple[Share, Share] = (0.0, 1.0)
    flow_shift: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    distilled_guidance: Rate | None = None
    max_sequence_length: NotNegative | None = None

    logging_steps: Positive = 20
    validation_steps: NotNegative = 350
    checkpointing_steps: NotNegative = 350
    checkpoints_total_limit: Annotated[int, Field(ge=2)] | None = 2
    resume_from_checkpoint: str | None = None
    force_resume: bool = False
    max_nonfinite_steps: NotNegative = 0

    def __post_init__(self) -> None:
        if self.max_grad_norm == math.inf:
            self.max_grad_norm = None
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm:g} would leave no gradient; use null for no clipping, or a number "
                "above 0."
            )
        if self.max_train_steps is None and self.num_train_epochs is None:
            raise ValueError("The training has no end; set max_train_steps or num_train_epochs.")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= LR_END:
            raise ValueError(f"The polynomial lr_scheduler ends at {LR_END:g}; choose a learning_rate above it.")
        if not self.timestep_range[0] < self.timestep_range[1]:
            raise ValueError(f"timestep_range needs low < high, not {list(self.timestep_range)}.")
        if self.loss.filter == "edges" and self.condition.kind not in EDGE_CONDITIONS:
            raise ValueError(
                f"loss=edges compares edges, but it can extract no condition={self.condition.kind} from an image; "
                f"choose condition={' or '.join(EDGE_CONDITIONS)}, or another loss."
            )
        if self.offload_base and not self.gradient_checkpointing:
            raise ValueError(
                "offload_base=true moves weights away that gradients need, unless their block is computed again; set "
                "gradient_checkpointing, too."
            )
        if self.adapter_model_name_or_path is None:
            self.adapter = self.adapter.filled(**MASKING)
        own = defaults_of(self.base.name, {"revision": self.base.revision, "local_files_only": True})
        if own is not None:
            self._take(own)
        sampled = self.timestep_sampling or "logit_normal"  # not known yet
        if sampled != "logit_normal" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                f"logit_mean and logit_std are of timestep_sampling=logit_normal, not {sampled}; leave them out."
            )
        shown = self.validation
        check_own_guidance(shown.unconditional_scale, shown.control_guidance_scale, shown.guidance_scale)

    def _take(self, own: BaseSpec) -> None:
        """Take what null stands for from a base. Stored as numbers, so that a later default changes nothing."""
        if self.timestep_sampling is None:
            self.timestep_sampling = own.timestep_sampling
        if self.adapter_model_name_or_path is None:  # else that adapter decides (adapter_plan.continued)
            self.adapter = self.adapter.of_new(own)
            self.proportion_full_masks = self.full_masks(own)
        seen, scored = self.validation, self.early_stopping
        self.validation = replace(seen, **_sampling(own, seen.guidance_scale, seen.scheduler))
        self.early_stopping = replace(scored, **_sampling(own, scored.guidance_scale, scored.scheduler))

    def full_masks(self, own: BaseSpec) -> float:
        """Return ``proportion_full_masks``, or what null stands for on a base."""
        if self.proportion_full_masks is not None:
            return self.proportion_full_masks
        adapter, loss = self.adapter, self.loss
        plain = adapter.mask_features and not adapter.mask_condition
        weighted = loss.mask_denoising or loss.masked_denoising_weight != 1
        return own.proportion_full_masks if plain and not weighted else 0.0

    def completed(self) -> TrainSettings:
        """Return the settings with the defaults of a base whose files had yet to be fetched."""
        shown = [(part.guidance_scale, part.scheduler) for part in (self.validation, self.early_stopping)]
        taken = (*(getattr(self.adapter, name) for name in OF_ADAPTER), self.proportion_full_masks)
        of_masks = () if self.adapter_model_name_or_path else taken  # of an adapter that is continued they come from it
        if None not in (self.timestep_sampling, *of_masks, *shown[0], *shown[1]):
            return self
        found = replace(self)
        found._take(self.base_defaults)
        return found

    @property
    def base_defaults(self) -> BaseSpec:
        """Return the defaults of the base, whose configs are fetched if they are not here."""
        where = {"revision": self.base.revision, "local_files_only": self.base.local_files_only}
        return defaults_of(self.base.name, where) or BaseSpec(self.base.name, self.base.name)

    @property
    def workers(self) -> int:
        """Return ``dataloader_num_workers``, or what null stands for on this machine."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this job on this machine
        return 0 if self.data.is_micro else max(0, min(MOST_WORKERS, available_cpus() // local - 1))

    @property
    def precision(self) -> str:
        """Return ``mixed_precision``, or that of `accelerate launch` where it is left open."""
        return self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    @property
    def generates_images(self) -> bool:
        """Return whether the training generates images, and so needs the encoders whatever is encoded already."""
        return bool(self.validation_steps or self.early_stopping.every)

    @property
    def steps(self) -> int:
        """Return ``max_train_steps``, which ``schedule.bound_steps`` computes from the size of the data."""
        assert self.max_train_steps is not None
        return self.max_train_steps


def _sampling(own: BaseSpec, guidance_scale: float | None, scheduler: SchedulerName | None) -> dict[str, Any]:
    """Return how to sample images, from a base where it is None."""
    scale = own.guidance_scale if guidance_scale is None else guidance_scale
    return {"guidance_scale": scale, "scheduler": scheduler or own.scheduler}
