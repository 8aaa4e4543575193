"""What changes during training, and how it is saved and found again."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from localctl.files import first_line, read_json, share_weights, write_json
from localctl.training.checkpoints import CheckpointError, save_checkpoint
from localctl.training.models import Models, load_models
from localctl.training.optimizer import averaged, make_ema, make_optimizer, optimizer_class
from localctl.training.schedule import learning_rate_at
from localctl.training.settings import EarlyStoppingConfig, TrainSettings
from localctl.training.step import StepStats

WAIT = timedelta(hours=2)  # of processes for one another: the first may be busy with a model card or a slow disk
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) + (
    pickle.UnpicklingError,
)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Unfit(ValueError):
    """A checkpoint that is whole, but not for these settings."""


@dataclass
class EarlyStopping:
    """What has been seen of the score: ``best`` at ``best_step``, and how many scores since were ``worse``."""

    config: EarlyStoppingConfig
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    last_step: int = 0

    def due(self, step: int) -> bool:
        """Whether the score is to be taken after ``step`` steps; only once for each."""
        return self.config.every > 0 and step % self.config.every == 0 and step > self.last_step

    def update(self, step: int, score: float) -> bool:
        """Take in the score after ``step`` steps; True if it is the best so far. One that is not finite never is."""
        assert step > self.last_step
        self.last_step = step
        better = math.isfinite(score) and (self.best is None or self._gain(score) > self.config.min_delta)
        if better:
            self.best, self.best_step, self.worse = score, step, 0
        else:
            self.worse += 1
        return better

    @property
    def stopped(self) -> bool:
        """Whether ``patience`` scores in a row were no better than the best."""
        return self.config.every > 0 and self.worse >= self.config.patience

    def _gain(self, score: float) -> float:
        assert self.best is not None
        return self.best - score if self.config.lower_is_better else score - self.best

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        seen = {name: getattr(self, name) for name in ("best", "best_step", "worse", "last_step")}
        return {**seen, "metric": self.config.metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; patience and the rest are those of the present settings. The best under
        another metric says nothing of this one, and is forgotten."""
        self.last_step = state["last_step"]
        if state.get("metric") == self.config.metric:
            self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]


@dataclass
class TrainState:
    """Models, optimizer and the number of finished steps (optimizer updates).

    There is no state of random generators: all noise is keyed by what it is for.

    resumed: a checkpoint was loaded. stats: what has been measured since the last row of the log. validated: the step
    of the last validation. skipped: updates left out so far because they were not finite. info: what a checkpoint's
    manifest says of the run (``resume.describe``). ema: the averaged weights, None without ``use_ema``.
    """

    settings: TrainSettings
    accelerator: Accelerator
    models: Models
    optimizer: Any
    step: int = 0
    resumed: bool = False
    stats: StepStats = field(default_factory=StepStats)
    validated: int = 0
    skipped: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    ema: Any = None
    early_stopping: EarlyStopping = field(init=False)

    def __post_init__(self) -> None:
        self.early_stopping = EarlyStopping(self.settings.early_stopping)

    def update_ema(self) -> None:
        """Take the weights of the step just made into the average; there are none where a scaler left it out."""
        if self.ema is not None and not self.optimizer.step_was_skipped:
            self.ema.step(self.models.plain_adapter.parameters())

    def averaged(self) -> AbstractContextManager[None]:
        """Return the adapter with its averaged weights, if there are any, as it is validated and exported."""
        return averaged(self.models.plain_adapter, self.ema)

    def agree(self, *values: int) -> list[int]:
        """Return the largest of each value over all processes; all of them must ask."""
        if self.accelerator.num_processes == 1:
            return list(values)
        largest = torch.tensor(values, device=self.accelerator.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.tolist()

    def set_learning_rate(self) -> float:
        """Set and return the learning rate of the coming step."""
        rate = learning_rate_at(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def save(self, folder: Path) -> None:
        """Commit ``folder/checkpoint-{step}``; all processes must call, the first one writes, and all learn when that
        failed (CheckpointError)."""
        stats = self.stats.state_dict(self.accelerator.gather)
        failure: CheckpointError | None = None
        if self.accelerator.is_main_process:
            try:
                limit = self.settings.checkpoints_total_limit
                write = partial(self._write, stats=stats)
                save_checkpoint(folder, self.step, write, keep=limit, info=self.info)
            except CheckpointError as error:
                failure = error
        if any(self.agree(failure is not None)):
            raise failure or CheckpointError(f"checkpoint-{self.step} could not be saved by the first process.")

    def _write(self, folder: Path, stats: dict[str, Any]) -> None:
        self.models.plain_adapter.save_pretrained(folder / "adapter")
        share_weights(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        if self.ema is not None:
            torch.save(self.ema.state_dict(), folder / "ema.pt")
        scaler = self.accelerator.scaler
        extra = {
            "step": self.step,
            "stats": stats,
            "scaler": scaler.state_dict() if scaler else None,
            "validated": self.validated,
            "skipped": self.skipped,
            "early_stopping": self.early_stopping.state_dict(),
        }
        write_json(folder / "state.json", extra, end="")

    def load(self, checkpoint: Path, step: int) -> None:
        """Continue from a verified checkpoint of ``step``. ValueError when it is of an adapter of another shape, or
        does not hold what a checkpoint of ours holds."""
        try:
            self._load(checkpoint, step)
        except _UNREADABLE as error:
            if isinstance(error, _Unfit):
                raise
            reason = first_line(error)[:200]
            raise ValueError(f"The checkpoint {checkpoint} cannot be used ({reason}); use another one.") from error
        self.resumed = True

    def _load(self, checkpoint: Path, step: int) -> None:
        weights = load_file(checkpoint / "adapter" / "diffusion_pytorch_model.safetensors")
        try:
            self.models.plain_adapter.load_state_dict(weights)
        except RuntimeError:
            raise _Unfit(
                f"The checkpoint {checkpoint} holds an adapter of another shape; use the settings it was saved with."
            ) from None
        # The groups' decay, betas and so on would come along; the settings have the say, if changed by force.
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        extra = read_json(checkpoint / "state.json", "the state")
        if extra["step"] != step:
            raise ValueError(f"its state is of step {extra['step']}, its manifest of {step}")
        self.step, self.validated, self.skipped = extra["step"], extra["validated"], extra["skipped"]
        self.early_stopping.load_state_dict(extra["early_stopping"])
        self._load_ema(checkpoint / "ema.pt")
        accelerator = self.accelerator
        self.stats = StepStats.from_state_dict(
            extra["stats"], accelerator.device, rank=accelerator.process_index, world_size=accelerator.num_processes
        )
        if self.accelerator.scaler is not None and extra["scaler"]:
            self.accelerator.scaler.load_state_dict(extra["scaler"])

    def _load_ema(self, path: Path) -> None:
        if self.ema is None:
            return
        if not path.exists():
            raise _Unfit(f"The checkpoint {path.parent} holds no averaged weights; set use_ema=false.")
        self.ema.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.ema.decay = self.settings.ema_decay  # as with the optimizer's options
        self.ema.to(self.accelerator.device)


def new_accelerator(settings: TrainSettings) -> Accelerator:
    """Where and how to compute, alone or with other processes. ValueError when the machine cannot."""
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )
    if accelerator.device.type == "cpu":
        set_cpu_threads(settings.cpu_threads, accelerator.num_processes, os.environ, launcher_environment())
    return accelerator


def new_state(settings: TrainSettings, accelerator: Accelerator) -> TrainState:
    """Frozen base, fresh adapter and optimizer. ValueError when settings and base do not fit."""
    optimizer_kind = optimizer_class(settings)
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    models = load_models(settings, accelerator.device, _DTYPES.get(accelerator.mixed_precision))
    parameters = [parameter for parameter in models.plain_adapter.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(optimizer_kind, parameters, settings)
    check_trainable(optimizer, {"adapter": models.plain_adapter, **models.frozen})
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:  # which would take it from a loader, if one were prepared
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
    models.adapter, prepared = accelerator.prepare(models.plain_adapter, optimizer)
    ema = make_ema(models.plain_adapter, settings)
    return TrainState(settings=settings, accelerator=accelerator, models=models, optimizer=prepared, ema=ema)


def check_trainable(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> None:
    """Assert that what the optimizer updates is exactly what wants a gradient, all of it float32."""
    updated = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    wanting = {id(p): name for name, module in modules.items() for p in module.parameters() if p.requires_grad}
    assert updated.keys() == wanting.keys(), f"trainable parts and the optimizer differ: {set(wanting.values())}"
    assert all(p.dtype == torch.float32 for p in updated.values()), "trained weights must be float32"


def set_cpu_threads(
    threads: int | None, processes: int, environment: Mapping[str, str], users: Collection[str] = ()
) -> None:
    """Use ``threads`` cores, or all of them where `accelerate launch` left one: it sets OMP_NUM_THREADS to 1 unless
    told otherwise, which would nearly double the time on the smallest machine. users: names of the variables that the
    user gave the launcher; an OMP_NUM_THREADS among them is kept."""
    if (
        threads is None
        and "ACCELERATE_MIXED_PRECISION" in environment
        and environment.get("OMP_NUM_THREADS") == "1"
        and "OMP_NUM_THREADS" not in users
    ):
        threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else None
    if threads is not None:
        torch.set_num_threads(threads)


def launcher_environment() -> list[str]:
    """Names of what the launcher of this process was given by its user, as far as the system tells."""
    try:
        content = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return []
    return [item.partition(b"=")[0].decode(errors="replace") for item in content.split(b"\0")]
