"""A training run from settings to adapter. ``prepare`` finds every user error before slow work; ``Run.train`` runs the
steps and what is due between them: log, validate, checkpoint, export."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from localctl.data import Batch, Source
from localctl.data.workers import WorkerError
from localctl.distributed import LostProcess, lost_process
from localctl.launchers import launcher
from localctl.messages import working
from localctl.pipelines import resolve_base
from localctl.redaction import flat, recorded
from localctl.signals import Interrupt
from localctl.training.adapter_plan import continued
from localctl.training.checkpoints import check_writable, read_manifest
from localctl.training.data import DataWatch, batches_of, has_own_masks, next_batch, open_sources, shared_quarantine
from localctl.training.earlier import as_earlier
from localctl.training.encoded import EncodedSource, describe_encoded, not_needed, plain
from localctl.training.events import Events, Scorer
from localctl.training.export import ADAPTER, check_hub, write_settings
from localctl.training.folder import RunFolder
from localctl.training.resume import check_alike, check_unchanged, describe
from localctl.training.schedule import FIRST_LOCAL, before_local_term, bound_steps, first_local_step
from localctl.training.settings import TrainSettings
from localctl.training.state import TrainState, new_accelerator, new_state
from localctl.training.step import StepNoise, StepOutput, sample_noise, training_step
from localctl.training.summary import announcement, disk_space_warning
from localctl.training.trackers import check_report_to, make_tracker
from localctl.training.updates import NotFiniteError as NotFiniteError
from localctl.training.updates import Updates
from localctl.training.validation import Fidelity, Validator

logger = logging.getLogger(__name__)
_SIGNAL_DELAY = 0.5  # seconds: a job may be stopped by a signal to each of its processes, workers too


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    step: the last finished step. interrupted: it stopped early, with a checkpoint to continue from. fidelity: the
    scores of the last validation, if any. signal: number of the signal that stopped it, or 0.
    """

    step: int
    output_dir: Path
    interrupted: bool
    fidelity: Fidelity | None = None
    signal: int = 0


def prepare(settings: TrainSettings, scorer: Scorer | None = None, parent: int | None = None) -> Run:
    """Check output folder, checkpoint, base and data, then load everything.

    Args:
        settings: of the run.
        scorer: computes the score for early stopping.
        parent: process id of the launcher when the program began, from :func:`~localctl.signals.launcher`.

    Raises:
        ValueError: the settings, the data or the checkpoint cannot be used; :class:`~localctl.lock.FolderInUse`:
            another run writes to the output folder.
        OSError: the disk cannot be read or written.
    """
    resolve_base(settings.base.name)
    settings = continued(settings.completed())
    if settings.push_to_hub:
        check_hub(settings.hub_token)
    check_report_to(settings.report_to, asdict(settings.wandb))
    output_dir = Path(settings.output_dir).expanduser()
    check_writable(output_dir)
    accelerator = new_accelerator(settings)
    check_alike(settings)
    folder = RunFolder(output_dir)
    try:
        state, train, val = _load(settings, accelerator, folder)
        run = Run(state, train, val, folder, scorer, Interrupt(launcher() if parent is None else parent))
        folder.make_ready(state.step, resumed=state.resumed)
        return run
    except BaseException:
        folder.release()
        raise


def _load(
    settings: TrainSettings, accelerator: Accelerator, folder: RunFolder
) -> tuple[TrainState, Source, Source | None]:
    """Load the state, the training data and the held-out data of a run."""
    checkpoint = folder.find_checkpoint(settings.resume_from_checkpoint, settings.overwrite_output_dir)
    manifest = None if checkpoint is None else read_manifest(checkpoint)
    settings = settings if manifest is None else as_earlier(settings, manifest["info"])
    train, val, sizes = open_sources(settings, accelerator, folder.path)
    settings = bound_steps(settings, len(train), accelerator.num_processes)
    with working(f"training: loading {settings.base.name}", shown=accelerator.is_main_process):
        absent = not_needed(train, settings)
        state = new_state(settings, accelerator, absent)
    for size in sorted(sizes):
        state.models.check_size(*size)
    if isinstance(train, EncodedSource):
        state.models.empty_text = train.empty_text
    else:
        views = 2 if settings.data.random_flip else 1
        largest = max(sizes, key=math.prod)
        state.models.keep_encodings(views * len(train), largest, images=settings.data.latents_may_be_kept)
    pipe = state.models.pipe
    base = {"pipeline": pipe, **pipe.components}
    state.info = describe(
        settings, plain(train), base, world_size=accelerator.num_processes, precision=accelerator.mixed_precision
    )
    describe_encoded(state.info, train, absent)
    state.info[FIRST_LOCAL] = first_local_step(settings, manifest and manifest["info"])
    if checkpoint is not None and manifest is not None:
        check_unchanged(manifest["info"], state.info, force=settings.force_resume)
        state.load(checkpoint, manifest["step"])
    if state.agree(state.step, -state.step) != [state.step, -state.step]:
        raise ValueError("The processes found different checkpoints; give all of them the same --output_dir.")
    return state, train, val


class Run:
    """A training run that is ready to start."""

    def __init__(
        self,
        state: TrainState,
        train: Source,
        val: Source | None,
        folder: RunFolder,
        scorer: Scorer | None,
        interrupt: Interrupt,
    ) -> None:
        self.state, self.settings = state, state.settings
        self.first_local = state.info[FIRST_LOCAL]
        self.without_local = before_local_term(state.settings) if self.first_local else state.settings
        self.train_source, self.folder, self.output_dir = train, folder, folder.path
        self.main = state.accelerator.is_main_process
        data = self.settings.data
        bad = shared_quarantine(state.accelerator, folder.path, len(train), data.max_bad_fraction, state.step)
        self.watch = DataWatch(bad, *((None, 0) if data.is_micro else state.models.denoiser.caption_tokens))
        self.updates = Updates(state)
        self.interrupt = interrupt
        validator = None if val is None or not self.main else Validator(state.models, self.settings, val)
        self.events = Events(state, folder.path, interrupt, scorer, validator)

    def train(self, stop: Callable[[int], bool] = lambda step: False) -> TrainResult:
        """Train to the last step and export; or until a signal or ``stop(step)``, with a checkpoint.

        ``stop`` must return the same on all processes; a signal to any of them stops all.

        Raises:
            NotFiniteError: a loss or gradient is not finite; the adapter was not changed by it.
            OSError: a file could not be written, a data worker was killed, another process ended, or the output folder
                was removed; the message says what is saved of the training.
        """
        try:
            with self.interrupt:
                self._begin()
                stopped = self._loop(stop)
                if not stopped:
                    self.events.finish(own_masks=has_own_masks(self.train_source))
        except RuntimeError as error:
            lost = lost_process(error)
            if lost is None:
                raise
            raise LostProcess(
                f"{lost}; continue from the last checkpoint with --resume_from_checkpoint latest."
            ) from error
        finally:
            self.events.tracker.close()
            self.folder.release()
        if self.folder.trouble:
            raise OSError(self.folder.trouble)
        if self.main:
            for line in self.watch.lines():
                logger.info(line)
            logger.info(self._closing_message(stopped))
        self.state.accelerator.wait_for_everyone()
        fidelity = self.events.last.fidelity if self.events.last else None
        return TrainResult(self.state.step, self.output_dir, stopped, fidelity, self.events.signal)

    def _begin(self) -> None:
        """Log what the run will do, and open the trackers."""
        if not self.main:
            return
        state, settings = self.state, self.settings
        logger.info(announcement(state, self.train_source, self.output_dir, scored=self.events.scorer is not None))
        if note := disk_space_warning(state, self.output_dir):
            logger.warning(note)
        values = flat(recorded(settings))
        named = asdict(settings.wandb)
        self.events.tracker = make_tracker(settings.report_to, self.output_dir, values, start=state.step, wandb=named)
        write_settings(settings, self.output_dir)

    def _loop(self, stop: Callable[[int], bool]) -> bool:
        """Run all steps and what is due between them. Return whether the run was stopped before its end."""
        state, events = self.state, self.events
        with self._bar() as bar, batches_of(self.train_source, self.state) as batches:
            events.before_the_first_step(bar)
            [events.signal] = state.agree(self.interrupt.signal)
            stopped = bool(events.signal)
            while not events.at_the_end and not stopped:
                try:
                    measured = self._step(batches, bar)
                except WorkerError as error:
                    self._save_without_worker(error)
                    return True
                stopped = stop(state.step)
                if stopped or events.are_due():
                    self.updates.settle()
                stopped = events.after_step(bar, measured, stopped)
                if self.folder.check():
                    write_settings(self.settings, self.output_dir)
                    self.interrupt.ask_to_stop()
        return stopped

    def _save_without_worker(self, error: WorkerError) -> None:
        """Save a checkpoint; raise the error unless a signal, which may have killed the worker, explains it."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.updates.settle()
        time.sleep(_SIGNAL_DELAY)
        [self.events.signal] = self.state.agree(self.interrupt.signal)
        saved = self.events.save_before_ending()
        if not self.events.signal:
            raise WorkerError(f"{str(error).rstrip('.')}; {saved}.") from error

    def _bar(self) -> Any:
        state, total = self.state, self.settings.steps
        options = {} if self.main else {"disable": True}  # on the main process, TQDM_DISABLE decides
        return tqdm(total=total, initial=state.step, desc="training", unit="step", mininterval=1, **options)

    def _step(self, batches: Iterator[Batch], bar: Any) -> dict[str, float | Tensor]:
        """Make one optimizer update from ``gradient_accumulation_steps`` micro-batches; return numbers for the log. The
        host never waits for the device: it runs ahead, and the device always has something to do."""
        state, settings = self.state, self.settings
        accelerator, models = state.accelerator, state.models
        started, waiting = time.perf_counter(), 0.0
        learning_rate = state.set_learning_rate()
        keys: list[str] = []
        outputs: list[StepOutput] = []
        for _ in range(settings.gradient_accumulation_steps):
            requested = time.perf_counter()
            batch, self.events.signal = next_batch(batches, state, self.watch, self.interrupt.signal)
            waiting += time.perf_counter() - requested
            keys += batch.keys
            batch = batch.to(accelerator.device)
            height, width = batch.pixels.shape[-2:]
            sampled = sample_noise(batch, models.latent_shape(height, width), settings).to(accelerator.device)
            compute = partial(self._compute, batch, sampled)
            if state.compilation is not None:
                state.compilation.check(batch.condition.shape, compute)
            with accelerator.accumulate(models.adapter):
                outputs.append(compute())
                accelerator.backward(outputs[-1].loss)
        for output in outputs:
            state.stats.add(output)
        grad_norm = self.updates.apply(keys, outputs)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if accelerator.num_processes == 1:  # several tell each other with the next batch
            self.events.signal = self.interrupt.signal
        samples = len(keys) * accelerator.num_processes
        state.stats.add_time(samples, time.perf_counter() - started, waiting)
        bar.update()
        return {"learning_rate": learning_rate, "grad_norm": grad_norm}

    def _compute(self, batch: Batch, sampled: StepNoise) -> StepOutput:
        with self.state.accelerator.autocast():
            settings = self.settings if self.state.step >= self.first_local else self.without_local
            return training_step(batch, self.state.models, settings, sampled)

    def _closing_message(self, stopped: bool) -> str:
        why = " (the process that launched this one has ended)" if self.interrupt.orphaned else ""
        if not stopped:
            return f"Done: {self.output_dir / ADAPTER} (README.md beside it shows what it does)."
        if not self.state.step:
            return f"Stopped before the first step{why}; nothing was trained."
        return (
            f"Stopped after step {self.state.step} with a checkpoint{why}; continue with --resume_from_checkpoint "
            "latest."
        )
