"""What happens between the steps and at the end: score, log, save, validate, export. None of it may end a training."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from localctl.data.bad_rows import TooManyBadRows
from localctl.files import first_line, remove
from localctl.messages import working
from localctl.signals import Interrupt
from localctl.training.checkpoints import CheckpointError, list_checkpoints, write_folders
from localctl.training.compilation import uncompiled
from localctl.training.export import ADAPTER, BEST, Finished, export, published, push, sheet_name
from localctl.training.models import Models
from localctl.training.state import TrainState
from localctl.training.trackers import STATS, Tracker, read_stats
from localctl.training.validation import References, ValidationResult, Validator, as_clause, validation_row

logger = logging.getLogger(__name__)
VALIDATED = "validation/f1"  # a row of the log with it is a validation


class Stopped(Exception):
    """A signal ended the validation."""


class Scorer(Protocol):
    """Scores the adapter in its present state, for example by FID.

    It is called on every process at the same step, so it may divide the work; it must return the same number on each.
    It may use the models, but must not change weights or the global random state.
    """

    def __call__(self, models: Models, step: int) -> float: ...


class Events:
    """Everything that is due after a step of a run.

    Checkpoints are saved before anything that may fail or take long. An exception of the validation, a score or a
    tracker is logged in one sentence, and the training goes on; a signal or unusable data end it as always. All
    processes must make the same calls.
    """

    def __init__(
        self,
        state: TrainState,
        output_dir: Path,
        interrupt: Interrupt,
        scorer: Scorer | None,
        validator: Validator | None,
    ) -> None:
        self.state, self.settings, self.output_dir = state, state.settings, output_dir
        self.interrupt, self.scorer = interrupt, scorer
        self.main = state.accelerator.is_main_process
        self.tracker = Tracker()
        self.signal = 0  # sent to any of the processes; all of them know it
        self.validator = validator
        self.references: References | None = None
        self.last: ValidationResult | None = None

    @property
    def at_the_end(self) -> bool:
        """Return whether no step is left."""
        return self.state.step >= self.settings.steps or self.state.early_stopping.stopped

    def validation_is_due(self) -> bool:
        """Return whether the settings ask for a validation after the present step."""
        step, every = self.state.step, self.settings.validation_steps
        return bool(every and step) and (step % every == 0 or self.at_the_end)

    def before_the_first_step(self, bar: Any) -> None:
        """Catch up on what an interruption prevented, and on the validation for the card of a finished run."""
        state = self.state
        [state.validated] = state.agree(max(state.validated, self._last_logged_validation()))
        if self.validation_is_due() and (self.at_the_end or state.validated != state.step):
            self.validate(bar)
        if not self.signal:
            self.score(bar)

    def are_due(self) -> bool:
        """Return whether :meth:`after_step` has anything to do after the present step."""
        step, settings = self.state.step, self.settings
        periods = (settings.logging_steps, settings.checkpointing_steps, settings.validation_steps)
        scored = self.scorer is not None and self.state.early_stopping.due(step)
        return bool(self.at_the_end or self.signal or scored or any(n and step % n == 0 for n in periods))

    def after_step(self, bar: Any, measured: Mapping[str, float | Tensor], stopped: bool) -> bool:
        """Score, log, save and validate as due; return whether to stop. measured: numbers of the step for the log,
        which waits for the device."""
        state, settings = self.state, self.settings
        if not stopped and not self.signal:
            self.score(bar)
        if state.step % settings.logging_steps == 0 or self.at_the_end:
            row = state.stats.row(state.models.num_train_timesteps, state.accelerator.gather)
            row |= {name: float(value) for name, value in measured.items()}
            self.tracker.log(state.step, row)
            bar.set_postfix({"loss": f"{row['loss']:.4f}", "local": f"{row['local_raw']:.3f}"}, refresh=False)
        every = settings.checkpointing_steps
        due = stopped or self.signal or (every and (state.step % every == 0 or self.at_the_end))
        if due:
            state.save(self.output_dir)
        if self.validation_is_due() and not stopped and not self.signal:
            self.validate(bar)
            if self.signal and not due:  # sent while validating
                state.save(self.output_dir)
        return stopped or bool(self.signal)

    def score(self, bar: Any) -> None:
        """Compute the score for early stopping, if it is due."""
        state, stopping = self.state, self.state.early_stopping
        if self.scorer is None or not stopping.due(state.step):
            return
        bar.set_postfix_str("scoring")
        score, failure = math.nan, ""
        with state.averaged(), uncompiled():
            try:
                score = self.scorer(state.models, state.step)
            except TooManyBadRows:
                raise
            except Exception as error:  # of any scorer: logged below; the training goes on
                failure = _type_and_message(error)
            if any(state.agree(bool(failure))):
                failure = failure or "another process failed"
                logger.warning(f"step {state.step}: no score ({failure}); the training goes on.")
                return
            if stopping.update(state.step, score) and self.main:
                self._save_best()
        best = {"score/best": stopping.best, "score/best_step": stopping.best_step}
        self.tracker.log(state.step, {"score": score, **best})
        if stopping.stopped:
            logger.info(f"step {state.step}: stopping, no score since step {stopping.best_step} was better.")

    def _save_best(self) -> None:
        """Write the adapter with the best score so far; log a warning if it cannot be written."""
        try:
            write_folders(self.output_dir, {BEST: self.state.models.plain_adapter.save_pretrained})
        except OSError as error:
            step = self.state.step
            logger.warning(f"step {step}: the best adapter so far was not saved, {error}; the training goes on.")

    def validate(self, bar: Any) -> None:
        """Generate the validation images on the first process. The others exchange values with it after each denoising
        step, so that all learn of a signal and none runs into a timeout."""
        state, done = self.state, 0
        while not self.main and not done:
            self.signal, done = state.agree(self.interrupt.signal, 0)
        if not self.main:
            return
        try:
            self._generate_validation(bar)
            state.validated = state.step
        except Stopped:
            logger.info(f"The validation at step {state.step} was interrupted; it is repeated on resuming.")
        except TooManyBadRows:
            raise
        except Exception as error:  # of whatever kind: the training goes on
            logger.warning(f"step {state.step}: no validation ({_type_and_message(error)}); the training goes on.")
        finally:
            self.signal, _ = state.agree(self.interrupt.signal, 1)

    def save_before_ending(self) -> str:
        """Save a checkpoint because the run must end here; return where it is, as a clause."""
        state = self.state
        if state.step == 0:
            return "no step was finished"
        if not any(state.agree(state.step in list_checkpoints(self.output_dir))):
            state.save(self.output_dir)
        return f"checkpoint-{state.step} holds all of the training: continue with --resume_from_checkpoint latest"

    def finish(self, own_masks: bool) -> None:
        """Write the adapter with its card, then upload it if ``push_to_hub``. A signal does not interrupt the writing,
        but prevents the upload.

        Raises:
            OSError: the adapter could not be written, and the message says where the training is saved instead; or it
                could not be uploaded.
        """
        state, failure = self.state, ""
        run = Finished(self.settings, state.step, self.last, self.references, own_masks)
        if self.main:
            try:
                with state.averaged(), working("training: exporting"):
                    export(state.models.plain_adapter, run, self.output_dir)
            except OSError as error:
                failure = str(error)
        if any(state.agree(bool(failure))):
            failure = failure or "The first process could not write the adapter"
            raise OSError(f"{failure}; {self._save_after_failed_export()}.")
        [self.signal] = state.agree(self.interrupt.signal)
        if not (self.main and self.settings.push_to_hub):
            return
        if self.signal:
            logger.info(
                "Not pushed to the hub, because of the signal; run the same command with --resume_from_checkpoint "
                "latest to push it."
            )
        else:
            push(self.output_dir, self.settings, published(run))

    def _save_after_failed_export(self) -> str:
        """Save the training after its export failed; return where it is, as a clause."""
        try:
            return self.save_before_ending()
        except CheckpointError:
            if not self.main:
                return "no checkpoint either"
        place = Path(tempfile.mkdtemp(prefix="localctl-"))
        try:
            with self.state.averaged():
                write_folders(place, {ADAPTER: self.state.models.plain_adapter.save_pretrained})
        except OSError:
            remove(place)
            return f"nor a checkpoint, nor the adapter alone in {place.parent}: this training could not be saved"
        return f"nor a checkpoint, but the adapter alone is saved in {place / ADAPTER}"

    def _generate_validation(self, bar: Any) -> None:
        step, validator = self.state.step, self.validator
        assert validator is not None
        made, shown_at, passes = 0, time.monotonic(), validator.steps * (1 if self.references else 2)
        bar.set_postfix_str("validating")

        def beat() -> None:
            nonlocal made, shown_at
            made += 1
            if time.monotonic() - shown_at > 1:  # seconds
                shown_at = time.monotonic()
                bar.set_postfix_str(f"validating, {made / passes:.0%}")
            self.signal, _ = self.state.agree(self.interrupt.signal, 0)
            if self.signal:
                raise Stopped

        with uncompiled():
            if self.references is None:
                self.references = validator.references(beat)
            with self.state.averaged():
                result = validator.run(beat)
        bar.set_postfix_str("", refresh=False)
        self.last = result
        fidelity, references = result.fidelity, self.references
        if self.state.validated != step:
            self.tracker.log(step, validation_row(fidelity, references))
            self.tracker.image(step, "validation/grid", result.sheet)
        path = self.output_dir / sheet_name(step)
        result.save(path)
        logger.info(f"step {step}: {as_clause(fidelity, references)}, {path}")

    def _last_logged_validation(self) -> int:
        """Return the step of the last validation in the log: a checkpoint is older than the validation after it."""
        if not (self.main and self.state.step and (self.output_dir / STATS).is_file()):
            return 0
        rows = read_stats(self.output_dir)
        return max((row["step"] for row in rows if VALIDATED in row and row["step"] <= self.state.step), default=0)


def _type_and_message(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
