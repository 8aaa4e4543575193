"""A training run from settings to adapter. ``prepare`` finds every user error before slow work; ``Run.train`` orders
the events: step, log, validate, checkpoint, export."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from localctl.base import resolve_base
from localctl.data import Batch, MaskedSamples, MicroScenes, PlanSampler, SamplePlan, Source, collate, open_files
from localctl.data.files import WITHOUT_VALIDATION
from localctl.layout import check_side
from localctl.random import generator
from localctl.run.checkpoints import find_checkpoint, sweep, verify_checkpoint
from localctl.run.interrupt import Interrupt, ignore_signals
from localctl.run.logging import Tracker, check_report_to, make_tracker
from localctl.run.record import flat, recorded
from localctl.training.announce import announcement
from localctl.training.data_watch import brings_masks, first_example, new_watch
from localctl.training.early_stopping import Scorer, take_score
from localctl.training.export import ADAPTER, BEST, export, sheet_name, write_settings
from localctl.training.folder import check_unused, check_writable, prepare_folder
from localctl.training.hub import check_hub
from localctl.training.resume import check_unchanged, describe
from localctl.training.schedule import bound_steps
from localctl.training.settings import TrainSettings
from localctl.training.state import TrainState, new_accelerator, new_state
from localctl.training.step import StepOutput, draw, training_step
from localctl.training.validation import Fidelity, References, ValidationResult, Validator, in_words, validation_row


class NotFiniteError(RuntimeError):
    """A loss or gradient is not finite, and the settings do not allow to leave out this update."""


class _Stopped(Exception):
    """Validation was given up because of a signal."""


@dataclass(frozen=True)
class TrainResult:
    """step: how far it got. interrupted: stopped early, with a checkpoint to continue from. fidelity: of the last
    validation, if any. signal: the number of the one that stopped it, or 0."""

    step: int
    output_dir: Path
    interrupted: bool
    fidelity: Fidelity | None = None
    signal: int = 0


def make_source(settings: TrainSettings, split: str) -> Source:
    """The data set of a split: ``train`` or ``val``."""
    data = settings.data
    if not data.is_micro:
        return open_files(data, settings.condition, split, WITHOUT_VALIDATION)
    assert data.count is not None
    count = data.count if split == "train" else 20 * settings.validation.count  # some are skipped
    return MicroScenes(split, data.profile, count, settings.condition)


def prepare(settings: TrainSettings, say: Callable[[str], None] = tqdm.write, scorer: Scorer | None = None) -> Run:
    """Check output folder, checkpoint, base and data, then load everything. ValueError in one sentence for the user."""
    resolve_base(settings.base.name)
    check_hub(settings)
    check_report_to(settings.report_to)
    output_dir = Path(settings.output_dir).expanduser()
    check_writable(output_dir)
    accelerator = new_accelerator(settings)
    if not accelerator.is_main_process:
        say = _silent
    else:
        sweep(output_dir)
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint, say)
    if checkpoint is None or checkpoint.resolve().parent != output_dir.resolve():
        check_unused(output_dir, settings.overwrite_output_dir, settings.resume_from_checkpoint)
    train = make_source(settings, "train")
    first = first_example(MaskedSamples(train, settings.mask, settings.seed))
    for name, side in zip(("height", "width"), first.pixels.shape[-2:], strict=True):
        check_side(name, side)
    if settings.validation_steps:
        make_source(settings, "val")  # its mistakes, too, before anything slow
    settings = bound_steps(settings, len(train), accelerator.num_processes)
    state = new_state(settings, accelerator)
    state.models.check_size(*first.pixels.shape[-2:])
    world_size, precision = accelerator.num_processes, accelerator.mixed_precision
    state.info = describe(settings, train, state.models.frozen, world_size=world_size, precision=precision)
    if checkpoint is not None:
        before = verify_checkpoint(checkpoint)["info"]
        check_unchanged(before, state.info, force=settings.force_resume, say=say)
        state.load(checkpoint)
    if state.agree(state.step, -state.step) != [state.step, -state.step]:
        raise ValueError("The processes found different checkpoints; give all of them the same --output_dir.")
    run = Run(state, train, say, scorer)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        prepare_folder(output_dir, state.step, checkpoint is not None, say)
    accelerator.wait_for_everyone()
    return run


def _start_worker(worker: int) -> None:
    """A data worker leaves signals to its parent, and has none of the threads that OpenCV had started there."""
    ignore_signals(worker)
    cv2.setNumThreads(0)


def _silent(text: str) -> None:
    """What the other processes would say, the first one says."""


class Run:
    """A prepared training run."""

    def __init__(self, state: TrainState, train: Source, say: Callable[[str], None], scorer: Scorer | None) -> None:
        self.state, self.settings, self.say = state, state.settings, say
        self.train_source, self.scorer = train, scorer
        self.output_dir = Path(self.settings.output_dir).expanduser()
        self.main = state.accelerator.is_main_process
        self.tracker = Tracker()
        self.watch = new_watch(
            state.accelerator, state.models, self.settings.data, self.output_dir, len(train), state.step
        )
        self.interrupt = Interrupt()
        self.signal = 0  # that any process was sent, as all of them know it
        self.validator: Validator | None = None
        self.references: References | None = None
        self.last: ValidationResult | None = None
        self.learning_rate, self.grad_norm = 0.0, 0.0  # of the last step
        if self.settings.validation_steps and self.main:
            self.validator = Validator(state.models, self.settings, make_source(self.settings, "val"))

    def train(self, stop: Callable[[int], bool] = lambda step: False) -> TrainResult:
        """Train to the last step and export; or until SIGINT, SIGTERM or ``stop(step)``, leaving a checkpoint.

        ``stop`` must say the same on all processes; a signal to any of them stops all.

        Raises:
            NotFiniteError: a loss or gradient is not finite; nothing was changed by it.
            CheckpointError: a checkpoint could not be written.
        """
        state, settings = self.state, self.settings
        if self.main:
            self.say(announcement(state, self.train_source, self.output_dir, scored=self.scorer is not None))
            values = flat(recorded(settings))
            self.tracker = make_tracker(settings.report_to, self.output_dir, values, start=state.step)
            write_settings(settings, self.output_dir)
        try:
            with self.interrupt, self._bar() as bar:
                at_the_end = self._at_the_end  # then for the model card
                if self._validation_is_due() and (at_the_end or state.validated != state.step):
                    self._validate()
                stopped = bool(self.signal)
                batches = iter(self._loader())
                if not stopped:
                    self._score()  # what an interruption kept from being scored
                while not self._at_the_end and not stopped:
                    self._step(batches, bar)
                    stopped = self._after_step(bar, stop(state.step))
            if not stopped and self.main:
                with state.averaged():
                    own = brings_masks(self.train_source)
                    export(state.models, settings, state.step, self.output_dir, self.last, self.references, own)
        finally:
            self.tracker.close()
        if self.main:
            for line in self.watch.lines():
                self.say(line)
            self.say(self._farewell(stopped))
        state.accelerator.wait_for_everyone()
        fidelity = self.last.fidelity if self.last else None
        return TrainResult(state.step, self.output_dir, stopped, fidelity, self.signal)

    def _loader(self) -> DataLoader:
        settings, accelerator = self.settings, self.state.accelerator
        sampler = PlanSampler(
            SamplePlan(len(self.train_source), settings.seed),
            settings.train_batch_size,
            self.state.step,
            settings.steps,
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
            worker_init_fn=_start_worker,
        )

    def _bar(self) -> Any:
        state, total = self.state, self.settings.steps
        options = {} if self.main else {"disable": True}  # of the main process TQDM_DISABLE decides
        return tqdm(total=total, initial=state.step, desc="training", unit="step", mininterval=1, **options)

    def _step(self, batches: Any, bar: Any) -> None:
        """One optimizer update, of ``gradient_accumulation_steps`` micro-batches."""
        state, settings = self.state, self.settings
        accelerator, models = state.accelerator, state.models
        begun, waiting = time.perf_counter(), 0.0
        self.learning_rate = state.set_learning_rate()
        keys: list[str] = []
        outputs: list[StepOutput] = []
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
                    outputs.append(training_step(batch, models, settings, draws))
                state.stats.add(outputs[-1])
                accelerator.backward(outputs[-1].loss)
        self.grad_norm = float(accelerator.clip_grad_norm_(models.plain_adapter.parameters(), settings.max_grad_norm))
        # A scaler leaves out steps whose gradient overflowed by its own factor; a loss it does not repair.
        watched = self.grad_norm if accelerator.scaler is None else sum(float(output.loss) for output in outputs)
        self.signal, bad = state.agree(self.interrupt.signal, not math.isfinite(watched))
        if bad:
            self._pass_over(keys, outputs)
        else:
            state.optimizer.step()
            state.update_ema()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        samples = len(keys) * accelerator.num_processes
        state.stats.add_time(samples, time.perf_counter() - begun, waiting)
        bar.update()

    def _pass_over(self, keys: list[str], outputs: list[StepOutput]) -> None:
        """Name the samples of a step that is not finite; NotFiniteError unless one more may be left out. All processes
        come here together, as their gradients are the same."""
        finite = torch.cat([torch.isfinite(output.terms.total.detach()) for output in outputs]).tolist()
        culprits = gather_object([key for key, fine in zip(keys, finite, strict=True) if not fine])
        what, names = ("loss", culprits) if culprits else ("gradient", gather_object(keys))
        found = f"The {what} is not finite at step {self.state.step + 1} (samples {', '.join(names)})"
        if self.state.skipped >= self.settings.max_nonfinite_steps:
            raise NotFiniteError(
                f"{found}; the adapter was not changed by it. Look at these samples, or lower the learning rate or the "
                "loss weight, and resume from the last checkpoint."
            )
        self.state.skipped += 1
        self.say(f"{found}; this update is left out, {self.state.skipped} so far.")

    @property
    def _at_the_end(self) -> bool:
        return self.state.step >= self.settings.steps or self.state.early_stopping.stopped

    def _validation_is_due(self) -> bool:
        step, every = self.state.step, self.settings.validation_steps
        return bool(every and step) and (step % every == 0 or self._at_the_end)

    def _score(self) -> None:
        """The score that early stopping goes by, if it is due."""
        state, folder = self.state, self.output_dir / BEST
        if self.scorer is None or not state.early_stopping.due(state.step):
            return
        with state.averaged():
            row = take_score(state.early_stopping, self.scorer, state.models, state.step, folder if self.main else None)
        self.tracker.log(state.step, row)
        if state.early_stopping.stopped:
            self.say(f"step {state.step}: stopping, no score since step {row['score/best_step']} was better.")

    def _after_step(self, bar: Any, stopped: bool) -> bool:
        """Log, validate, save: whatever is due. Returns whether to stop here."""
        state, settings = self.state, self.settings
        if not stopped and not self.signal:
            self._score()
        last = self._at_the_end
        if state.step % settings.logging_steps == 0 or last:
            row = state.stats.row(state.models.num_train_timesteps, state.accelerator.gather)
            row |= {"learning_rate": self.learning_rate, "grad_norm": self.grad_norm}
            self.tracker.log(state.step, row)
            bar.set_postfix({"loss": f"{row['loss']:.4f}", "local": f"{row['local_raw']:.3f}"}, refresh=False)
        if self._validation_is_due() and not stopped and not self.signal:
            self._validate()
        stopped = stopped or bool(self.signal)
        every = settings.checkpointing_steps
        if stopped or (every and (state.step % every == 0 or last)):
            state.save(self.output_dir)
        return stopped

    def _validate(self) -> None:
        """Draw the validation pictures on the first process. The others keep step with it, so that a signal to any of
        them is heard and none waits long enough to be given up."""
        state, done = self.state, 0
        while not self.main and not done:
            self.signal, done = state.agree(self.interrupt.signal, 0)
        if not self.main:
            return
        try:
            self._draw_validation()
            state.validated = state.step
        except _Stopped:
            self.say(f"Validation at step {state.step} was given up; it is made good on resuming.")
        finally:
            self.signal, _ = state.agree(self.interrupt.signal, 1)

    def _beat(self) -> None:
        self.signal, _ = self.state.agree(self.interrupt.signal, 0)
        if self.signal:
            raise _Stopped

    def _draw_validation(self) -> None:
        step, validator = self.state.step, self.validator
        assert validator is not None
        if self.references is None:
            self.references = validator.references(self._beat)
        with self.state.averaged():
            result = validator.run(self._beat)
        self.last = result
        path = self.output_dir / sheet_name(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        result.sheet.save(path)
        fidelity, references = result.fidelity, self.references
        if self.state.validated != step:
            self.tracker.log(step, validation_row(fidelity, references))
            self.tracker.image(step, "validation/grid", result.sheet)
        self.say(f"step {step}: {in_words(fidelity, references)}, {path}")

    def _farewell(self, interrupted: bool) -> str:
        if interrupted:
            return (
                f"Stopped after step {self.state.step} with a checkpoint; go on with --resume_from_checkpoint latest."
            )
        return f"Done: {self.output_dir / ADAPTER} (README.md beside it shows what it does)."
