"""Everything a training run can be told, typed and checked. Top-level names are those of diffusers' scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from localctl.base import SCHEDULERS, BaseConfig
from localctl.conditions import ConditionConfig
from localctl.data.config import DataConfig
from localctl.diffusion import TIMESTEP_SAMPLINGS
from localctl.losses import LossConfig
from localctl.masks import MASK_RESIZE, MaskConfig
from localctl.run.logging import REPORT_TO

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
MIXED_PRECISION = ("no", "fp16", "bf16")
ADAPTER_TYPES = ("full_adapter", "light_adapter")
ALIASES = {
    "pretrained_model_name_or_path": "base",
    "revision": "base.revision",
    "variant": "base.variant",
    "dataset_name": "data",
    "dataset_config_name": "data.dataset_config_name",
    "cache_dir": "data.cache_dir",
    "train_data_dir": "data.path",
    "image_column": "data.image_column",
    "conditioning_image_column": "data.conditioning_image_column",
    "mask_column": "data.mask_column",
    "caption_column": "data.caption_column",
    "resolution": "data.resolution",
    "center_crop": "data.center_crop",
    "random_flip": "data.random_flip",
    "max_train_samples": "data.count",
    "num_validation_images": "validation.count",
}
FREE_GROUPS = {"base": "base.name", "data": "data.name"}


def _choose(what: str, value: str | None, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {what} {value!r}; choose one of {', '.join(known)}.")


def _at_least(what: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{what} must be at least {least}, not {value}.")


@dataclass(kw_only=True)
class AdapterConfig:
    """Shape of the T2I-Adapter inside, and how its features are masked. channels null: those of the base's U-Net."""

    adapter_type: str = "full_adapter"
    channels: tuple[int, ...] | None = None
    num_res_blocks: int = 2
    downscale_factor: int = 8
    mask_resize: str = "area"
    mask_condition: bool = False

    def __post_init__(self) -> None:
        _choose("adapter_type", self.adapter_type, ADAPTER_TYPES)
        _choose("adapter.mask_resize", self.mask_resize, MASK_RESIZE)
        _at_least("adapter.num_res_blocks", self.num_res_blocks, 1)
        _at_least("adapter.downscale_factor", self.downscale_factor, 1)
        if self.channels is not None and (not self.channels or min(self.channels) < 1):
            raise ValueError(f"adapter.channels must be positive numbers, not {list(self.channels)}.")


@dataclass(kw_only=True)
class ValidationConfig:
    """Pictures of held-out scenes with fixed prompts, masks and noise. count: how many are drawn and scored; rows: how
    many of them the grid shows; the rest as for the pipeline."""

    count: int = 16
    rows: int = 6
    batch_size: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    scheduler: str = "ddim"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "rows", "batch_size", "num_inference_steps"):
            _at_least(f"validation.{name}", getattr(self, name), 1)
        _choose("validation.scheduler", self.scheduler, tuple(SCHEDULERS))


@dataclass(kw_only=True)
class TrainSettings:
    """A training run; ValueError for settings that make no sense.

    max_train_steps, validation_steps, checkpointing_steps, logging_steps, lr_warmup_steps count optimizer updates;
        0 turns validation or checkpoints off.
    train_batch_size: samples per process and micro-batch; gradient_accumulation_steps micro-batches make a step.
    mixed_precision: no, fp16, bf16, or null for what `accelerate` was configured with; trained weights stay float32.
    checkpoints_total_limit: null keeps all; at least 2, as a single one may turn out damaged.
    resume_from_checkpoint: `latest` or the path of a checkpoint.
    force_resume: go on also when settings, data or the number of processes changed (docs/reliability.md).
    max_nonfinite_steps: so many updates may be left out because they are not finite; one more stops the run.
    cpu_threads: on a CPU; null = torch's own choice (all cores if `accelerate launch` left only one).
    """

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    output_dir: str = "outputs/adapter"
    overwrite_output_dir: bool = False
    seed: int = 0
    report_to: str = "tensorboard"

    max_train_steps: int = 900
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    dataloader_num_workers: int = 0
    mixed_precision: str | None = None
    cpu_threads: int | None = None

    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 50
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    proportion_empty_prompts: float = 0.1
    timestep_sampling: str = "cubic"

    logging_steps: int = 20
    validation_steps: int = 300
    checkpointing_steps: int = 300
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    force_resume: bool = False
    max_nonfinite_steps: int = 0

    def __post_init__(self) -> None:
        ones = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps")
        zeros = ("dataloader_num_workers", "lr_warmup_steps", "validation_steps", "checkpointing_steps") + (
            "max_nonfinite_steps",
        )
        rates = ("learning_rate", "adam_weight_decay", "adam_epsilon", "max_grad_norm")
        for names, least in ((ones, 1), (zeros, 0), (rates, 0)):
            for name in names:
                _at_least(name, getattr(self, name), least)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}.")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts must lie in [0, 1], not {self.proportion_empty_prompts}.")
        _choose("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        _choose("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        _choose("report_to", self.report_to, REPORT_TO)
        if self.mixed_precision is not None:
            _choose("mixed_precision", self.mixed_precision, MIXED_PRECISION)
        if self.checkpoints_total_limit is not None:
            _at_least("checkpoints_total_limit", self.checkpoints_total_limit, 2)
        if self.cpu_threads is not None:
            _at_least("cpu_threads", self.cpu_threads, 1)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step ``step`` (0 = the first): linear warm-up, then as ``lr_scheduler`` says.

        A function of the step alone, so there is nothing to save, and nothing that several processes could advance
        several times.
        """
        if self.lr_scheduler != "constant" and step < self.lr_warmup_steps:
            return self.learning_rate * step / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps)
        if self.lr_scheduler == "linear":
            return self.learning_rate * max(0.0, 1 - progress)
        if self.lr_scheduler == "cosine":
            return self.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return self.learning_rate
