"""The state of a training run, and how it is saved and loaded."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from localctl.architectures import read_shape
from localctl.distributed import Messages, joining, processes
from localctl.files import first_line, read_json, share_weights, write_json
from localctl.training.checkpoints import CheckpointError, save_checkpoint
from localctl.training.compilation import Compilation
from localctl.training.frozen import dtype_of
from localctl.training.models import Models, load_models
from localctl.training.optimizer import averaged, make_ema, make_optimizer, optimizer_class
from localctl.training.schedule import learning_rate_at
from localctl.training.settings import EarlyStoppingConfig, TrainSettings
from localctl.training.step import StepStats

WAIT = timedelta(hours=2)  # timeout between processes: the first may be busy with a model card or a slow disk
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) + (
    pickle.UnpicklingError,
)


class _Unfit(ValueError):
    """The checkpoint is undamaged, but does not fit the settings."""


@dataclass
class EarlyStopping:
    """The best score so far, its step, and how many scores in a row since were not better (``worse``)."""

    config: EarlyStoppingConfig
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    last_step: int = 0

    def due(self, step: int) -> bool:
        """Return whether the score is due after ``step`` steps, once for each step."""
        return self.config.every > 0 and step % self.config.every == 0 and step > self.last_step

    def update(self, step: int, score: float) -> bool:
        """Add the score after ``step`` steps; return whether it is the best so far, which one that is not finite never
        is."""
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
        """Return whether ``patience`` scores in a row were no better than the best."""
        return self.config.every > 0 and self.worse >= self.config.patience

    def _gain(self, score: float) -> float:
        assert self.best is not None
        return self.best - score if self.config.lower_is_better else score - self.best

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        seen = {name: getattr(self, name) for name in ("best", "best_step", "worse", "last_step")}
        return {**seen, "metric": self.config.metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, under the present settings. The best score of another metric is discarded."""
        self.last_step = state["last_step"]
        if state.get("metric") == self.config.metric:
            self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]


@dataclass
class TrainState:
    """Models, optimizer and the number of finished steps (optimizer updates).

    Random generators have no state to save: all noise is keyed by its purpose.

    resumed: a checkpoint was loaded. stats: measurements since the last row of the log. validated: the step of the last
    validation. skipped: number of updates skipped because they were not finite. info: the description of the run in
    manifests (``resume.describe``). ema: the averaged weights; None without ``use_ema``. compilation: None without
    ``compile``.
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
    compilation: Compilation | None = None
    messages: Messages = field(default_factory=lambda: Messages(WAIT))

    def __post_init__(self) -> None:
        self.early_stopping = EarlyStopping(self.settings.early_stopping)

    def update_ema(self) -> None:
        """Add the new weights to the average, unless a gradient scaler skipped the step."""
        if self.ema is not None and not self.optimizer.step_was_skipped:
            self.ema.step(self.models.plain_adapter.parameters())

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the adapter has its averaged weights, if there are any, as for validation and export."""
        return averaged(self.models.plain_adapter, self.ema)

    def agree(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes; all of them must call. No device is waited for."""
        return self.messages.largest(*values)

    def set_learning_rate(self) -> float:
        """Set and return the learning rate of the coming step."""
        rate = learning_rate_at(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def save(self, folder: Path) -> None:
        """Save ``folder/checkpoint-{step}``; all processes must call, the first one writes. CheckpointError on all of
        them if that failed."""
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
        """Load a verified checkpoint of ``step``. ValueError if its adapter has another shape or its content cannot be
        read."""
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
        # The optimizer's options come from the settings, not from the checkpoint: they may be changed by force. `fused`
        # comes from the device; it decides where the numbers of steps are loaded to.
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        for group, option in zip(saved["param_groups"], options, strict=True):
            group.update(option)
        self.optimizer.load_state_dict(saved)
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
    """Return the Accelerator for ``settings``. ValueError if the machine cannot do what they ask for, or if this
    process would not train together with the others that were started with it."""
    started = processes()[1]
    if started > 1 and "LOCAL_RANK" not in os.environ:  # accelerate would wait for the others, or train alone
        raise _not_joined(started)
    with joining() if started > 1 else nullcontext():
        accelerator = Accelerator(
            cpu=started > 1 and not _has_own_backend(),  # accelerate joins processes without GPUs only if asked to
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            mixed_precision=settings.mixed_precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        )
    if started > 1 and accelerator.num_processes == 1:
        raise _not_joined(started)
    if accelerator.device.type == "cpu":
        set_cpu_threads(settings.cpu_threads, accelerator.num_processes, os.environ, launcher_environment())
    return accelerator


def _not_joined(started: int) -> ValueError:
    return ValueError(
        f"WORLD_SIZE={started} names {started} processes, but accelerate does not join this one to the others; start "
        "them with torchrun, or set WORLD_SIZE=1 to train in one process."
    )


def _has_own_backend() -> bool:
    """Return whether this machine has devices among which accelerate joins processes; Apple's are none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found is not None and found.type != "mps"


def new_state(settings: TrainSettings, accelerator: Accelerator, without: Collection[str] = ()) -> TrainState:
    """Load the frozen base, ``without`` parts that are not needed, and create the adapter and the optimizer. ValueError
    if settings and base do not fit."""
    optimizer_kind = optimizer_class(settings)
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if accelerator.distributed_type == DistributedType.FSDP and read_shape(settings.base).denoiser == "transformer":
        raise ValueError(
            "FSDP shards what is trained, not the frozen transformer, which would be whole in each process; use DDP, "
            "with --quantization or --offload_base if it does not fit."
        )
    models = load_models(settings, accelerator.device, dtype_of(settings, accelerator.mixed_precision), without)
    parameters = [parameter for parameter in models.plain_adapter.parameters() if parameter.requires_grad]
    compilation = Compilation(models) if settings.compile else None
    optimizer = make_optimizer(optimizer_kind, parameters, settings)
    check_trainable(optimizer, {"adapter": models.plain_adapter, **models.frozen})
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:  # it reads the batch size from a prepared data loader, but there is none
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
    models.adapter, prepared = accelerator.prepare(models.plain_adapter, optimizer)
    ema = make_ema(models.plain_adapter, settings)
    return TrainState(
        settings=settings, accelerator=accelerator, models=models, optimizer=prepared, ema=ema, compilation=compilation
    )


def check_trainable(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> None:
    """Assert that the optimizer updates exactly the parameters that require gradients, all of them float32."""
    updated = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    wanting = {id(p): name for name, module in modules.items() for p in module.parameters() if p.requires_grad}
    assert updated.keys() == wanting.keys(), f"trainable parts and the optimizer differ: {set(wanting.values())}"
    assert all(p.dtype == torch.float32 for p in updated.values()), "trained weights must be float32"


def set_cpu_threads(
    threads: int | None, processes: int, environment: Mapping[str, str], users: Collection[str] = ()
) -> None:
    """Use ``threads`` threads; None: all cores where `accelerate launch` has set OMP_NUM_THREADS to 1, which nearly
    doubles the time on the smallest machine. users: names of the environment variables that the user gave the launcher;
    an OMP_NUM_THREADS among them is respected."""
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
    """Return the names of the launcher's environment variables; empty where the system does not show them."""
    try:
        content = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return []
    return [item.partition(b"=")[0].decode(errors="replace") for item in content.split(b"\0")]
