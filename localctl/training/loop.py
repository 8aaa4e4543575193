"""A training run from settings to adapter. ``prepare`` finds every user error before slow work; ``Run.train`` orders
the events: step, log, validate, checkpoint, export."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from localctl.base import resolve_base
from localctl.data import Batch, MaskedSamples, MicroScenes, PlanSampler, SamplePlan, Source, collate, open_files
from localctl.data.bad import QUARANTINE
from localctl.layout import check_side
from localctl.random import generator
from localctl.run.checkpoints import find_checkpoint, list_checkpoints, set_aside_later
from localctl.run.interrupt import Interrupt, ignore_interrupt
from localctl.run.logging import STATS, FileTracker, Tracker
from localctl.training.data_watch import describe, first_example, new_watch
from localctl.training.export import (
    ADAPTER,
    CARD,
    CONFIG,
    T2IADAPTER,
    effective_batch,
    export,
    sheet_name,
    write_settings,
)
from localctl.training.settings import TrainSettings
from localctl.training.state import TrainState, new_state
from localctl.training.step import draw, training_step
from localctl.training.validation import Fidelity, References, ValidationResult, Validator

_OUTPUTS = (STATS, QUARANTINE, "logs", "validation", ADAPTER, T2IADAPTER, CARD, CONFIG)


@dataclass(frozen=True)
class TrainResult:
    """step: how far it got. interrupted: stopped early, with a checkpoint to continue from. fidelity: of the last
    validation, if any."""

    step: int
    output_dir: Path
    interrupted: bool
    fidelity: Fidelity | None = None


def make_source(settings: TrainSettings, split: str) -> Source:
    """The data set of a split: ``train`` or ``val``."""
    data = settings.data
    if not data.is_micro:
        return open_files(data, settings.condition, split)
    assert data.count is not None
    count = data.count if split == "train" else 20 * settings.validation.count  # some are skipped
    return MicroScenes(split, data.profile, count, settings.condition)


def prepare(settings: TrainSettings, say: Callable[[str], None] = tqdm.write) -> Run:
    """Check output folder, checkpoint, base and data, then load everything. ValueError in one sentence for the user."""
    resolve_base(settings.base.name)
    output_dir = Path(settings.output_dir).expanduser()
    check_writable(output_dir)
    checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint, say)
    if checkpoint is None or checkpoint.resolve().parent != output_dir.resolve():
        check_unused(output_dir, settings.overwrite_output_dir)
    train = make_source(settings, "train")
    first = first_example(MaskedSamples(train, settings.mask, settings.seed))
    for name, side in zip(("height", "width"), first.pixels.shape[-2:], strict=True):
        check_side(name, side)
    if settings.validation_steps:
        make_source(settings, "val")  # its mistakes, too, before anything slow
    state = new_state(settings)
    if checkpoint is not None:
        state.load(checkpoint)
    run = Run(state, train, say)
    if state.accelerator.is_main_process:
        prepare_folder(output_dir, state.step, checkpoint is not None, say)
    state.accelerator.wait_for_everyone()
    return run


def check_writable(folder: Path) -> None:
    """ValueError when ``folder`` is not there and cannot be made, or cannot be written to."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"Nothing can be written to {folder}, because of {nearest}; choose another --output_dir.")


def check_unused(folder: Path, overwrite: bool) -> None:
    """ValueError when ``folder`` holds an earlier run that would be mixed up or lost, or files of somebody else's by
    the names of ours, which not even ``overwrite`` may touch."""
    if not holds_run(folder):
        foreign = [name for name in _OUTPUTS if (folder / name).exists()]
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]}, but not of a training run; choose another --output_dir.")
    elif not overwrite:
        way_on = "continue it with --resume_from_checkpoint latest, " if list_checkpoints(folder) else ""
        raise ValueError(
            f"{folder} holds an earlier run{'' if way_on else ' without a checkpoint'}; {way_on}choose another "
            "--output_dir, or pass --overwrite_output_dir to replace it."
        )


def holds_run(folder: Path) -> bool:
    """Whether a training run has written to ``folder``."""
    return bool(list_checkpoints(folder)) or (folder / STATS).exists()


def prepare_folder(folder: Path, step: int, resumed: bool, say: Callable[[str], None]) -> None:
    """Resumed: set aside checkpoints beyond ``step``. Fresh: remove an earlier run, which ``check_unused`` let pass."""
    if resumed:
        set_aside_later(folder, step, say)
    if resumed or not holds_run(folder):
        return
    for path in [*list_checkpoints(folder).values(), *(folder / name for name in _OUTPUTS)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Run:
    """A prepared training run."""

    def __init__(self, state: TrainState, train: Source, say: Callable[[str], None]) -> None:
        self.state, self.settings, self.say = state, state.settings, say
        self.train_source = train
        self.output_dir = Path(self.settings.output_dir).expanduser()
        self.main = state.accelerator.is_main_process
        self.tracker = Tracker()
        self.watch = new_watch(
            state.accelerator, state.models, self.settings.data, self.output_dir, len(train), state.step
        )
        self.validator: Validator | None = None
        self.references: References | None = None
        self.last: ValidationResult | None = None
        self.learning_rate, self.grad_norm = 0.0, 0.0  # of the last step
        if self.settings.validation_steps and self.main:
            self.validator = Validator(state.models, self.settings, make_source(self.settings, "val"))

    def train(self, stop: Callable[[int], bool] = lambda step: False) -> TrainResult:
        """Train to the last step and export; or until SIGINT or ``stop(step)``, leaving a checkpoint."""
        state, settings = self.state, self.settings
        if self.main:
            self.say(self.announcement())
            tensorboard = settings.report_to == "tensorboard"
            self.tracker = FileTracker(self.output_dir, start=state.step, tensorboard=tensorboard)
            write_settings(settings, self.output_dir)
        interrupted = False
        try:
            with Interrupt() as interrupt, self._bar() as bar:
                batches = iter(self._loader())
                while state.step < settings.max_train_steps and not interrupted:
                    self._step(batches, bar)
                    interrupted = interrupt.requested or stop(state.step)
                    self._after_step(bar, interrupted)
            if not interrupted:
                self._finish()
        finally:
            self.tracker.close()
        if self.main:
            for line in self.watch.lines():
                self.say(line)
            self.say(self._farewell(interrupted))
        return TrainResult(state.step, self.output_dir, interrupted, self.last.fidelity if self.last else None)

    def announcement(self) -> str:
        """What is about to be trained, on what, for how long."""
        settings, models, accelerator = self.settings, self.state.models, self.state.accelerator
        trained = sum(p.numel() for p in models.plain_adapter.parameters())
        frozen = sum(p.numel() for part in models.frozen.values() for p in part.parameters())
        loss = "denoising"
        if settings.loss.filter != "none":
            loss += f" + {settings.loss.weight:g} x {settings.loss.filter} in the mask ({settings.loss.schedule})"
        batch = effective_batch(settings) * accelerator.num_processes
        threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
        begin = f"from {self.state.step} " if self.state.step else ""
        steps = f"{begin}to {settings.max_train_steps}, {batch} samples each, on {accelerator.device}{threads}"
        return "\n".join(
            (
                f"base        {settings.base.name}, frozen ({frozen:,} parameters)",
                f"adapter     {settings.adapter.adapter_type} ({trained:,} parameters, trained)",
                f"condition   {settings.condition.kind}, obeyed inside {settings.mask.kind} masks (white = controlled)",
                f"loss        {loss}",
                f"data        {describe(settings.data, self.train_source)}",
                f"steps       {steps}",
                f"output      {self.output_dir}",
            )
        )

    def _loader(self) -> DataLoader:
        settings, accelerator = self.settings, self.state.accelerator
        sampler = PlanSampler(
            SamplePlan(len(self.train_source), settings.seed),
            settings.train_batch_size,
            self.state.step,
            settings.max_train_steps,
            accumulation=settings.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return DataLoader(
            MaskedSamples(self.train_source, settings.mask, settings.seed),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=settings.dataloader_num_workers,
            generator=generator(settings.seed, "loader"),  # or the loader would draw from the global random state
            worker_init_fn=ignore_interrupt,
        )

    def _bar(self) -> Any:
        state, total = self.state, self.settings.max_train_steps
        return tqdm(total=total, initial=state.step, desc="training", unit="step", disable=not self.main, mininterval=1)

    def _step(self, batches: Any, bar: Any) -> None:
        """One optimizer update, of ``gradient_accumulation_steps`` micro-batches."""
        state, settings = self.state, self.settings
        accelerator, models = state.accelerator, state.models
        begun, waiting = time.perf_counter(), 0.0
        self.learning_rate = state.set_learning_rate()
        keys: list[str] = []
        for _ in range(settings.gradient_accumulation_steps):
            asked = time.perf_counter()
            batch: Batch = next(batches)
            waiting += time.perf_counter() - asked
            self.watch.look_at(batch, state.step + 1)
            keys += batch.keys
            batch = batch.to(accelerator.device)
            height, width = batch.pixels.shape[-2:]
            draws = draw(batch, models.latent_shape(height, width), settings).to(accelerator.device)
            with accelerator.accumulate(models.adapter):
                with accelerator.autocast():
                    output = training_step(batch, models, settings, draws)
                state.stats.add(output)
                accelerator.backward(output.loss)
        self.grad_norm = float(accelerator.clip_grad_norm_(models.plain_adapter.parameters(), settings.max_grad_norm))
        if accelerator.scaler is None and not math.isfinite(self.grad_norm):  # the scaler skips such steps itself
            raise RuntimeError(
                f"The gradient is not finite at step {state.step + 1} (samples {', '.join(keys)}); the adapter was not "
                "changed by it. Lower the learning rate or the loss weight and resume from the last checkpoint."
            )
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        samples = len(keys) * accelerator.num_processes
        state.stats.add_time(samples, time.perf_counter() - begun, waiting)
        bar.update()

    def _after_step(self, bar: Any, interrupted: bool) -> None:
        """Log, validate, save: whatever is due."""
        state, settings = self.state, self.settings
        last = state.step == settings.max_train_steps
        if state.step % settings.logging_steps == 0 or last:
            row = state.stats.row(state.models.num_train_timesteps, state.accelerator.gather)
            row |= {"learning_rate": self.learning_rate, "grad_norm": self.grad_norm}
            self.tracker.log(state.step, row)
            bar.set_postfix({"loss": f"{row['loss']:.4f}", "local": f"{row['local_raw']:.3f}"}, refresh=False)
        if self.validator is not None and not interrupted and (state.step % settings.validation_steps == 0 or last):
            self._validate(self.validator)
        every = settings.checkpointing_steps
        if interrupted or (every and (state.step % every == 0 or last)):
            if self.main:
                state.save(self.output_dir)
            state.accelerator.wait_for_everyone()

    def _validate(self, validator: Validator) -> None:
        step = self.state.step
        if self.references is None:
            self.references = validator.references()
        result = self.last = validator.run()
        path = self.output_dir / sheet_name(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        result.sheet.save(path)
        fidelity, references = result.fidelity, self.references
        control = references.control(fidelity.f1)
        self.tracker.log(
            step,
            {
                "validation/f1": fidelity.f1,
                "validation/precision": fidelity.precision,
                "validation/recall": fidelity.recall,
                "validation/control": control,
                "validation/base_f1": references.base.f1,
                "validation/round_trip_f1": references.round_trip.f1,
            },
        )
        self.tracker.image(step, "validation/grid", result.sheet)
        self.say(
            f"step {step}: edges in the mask F1 {fidelity.f1:.3f} (base alone {references.base.f1:.3f}, ceiling "
            f"{references.round_trip.f1:.3f}), {path}"
        )

    def _finish(self) -> None:
        """The last validation has run; a resumed run that had nothing left to do validates now."""
        if not self.main:
            return
        if self.validator is not None and self.last is None:
            self._validate(self.validator)
        export(self.state.models, self.settings, self.state.step, self.output_dir, self.last, self.references)

    def _farewell(self, interrupted: bool) -> str:
        if interrupted:
            return (
                f"Stopped after step {self.state.step} with a checkpoint; go on with --resume_from_checkpoint latest."
            )
        return f"Done: {self.output_dir / ADAPTER} (README.md beside it shows what it does)."
