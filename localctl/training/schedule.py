"""The number of steps and the learning rate of each: functions of the settings and the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from localctl.messages import warning
from localctl.settings import LossConfig
from localctl.training.settings import LR_END, TrainSettings

FIRST_LOCAL = "first_local_step"  # in the description of a run


def learning_rate_at(settings: TrainSettings, step: int) -> float:
    """Compute the learning rate of step ``step`` (0 = the first): linear warm-up, then ``lr_scheduler``, with the
    formulas of diffusers' ``get_scheduler``.

    A function of the step has no state to save, and several processes cannot advance it several times.
    (``get_scheduler`` rounds differently, so that runs resumed from older checkpoints would not be bit-equal.)
    """
    name, peak = settings.lr_scheduler, settings.learning_rate
    if name == "constant":
        return peak
    if step < settings.lr_warmup_steps:
        return peak * step / settings.lr_warmup_steps
    if name == "constant_with_warmup":
        return peak
    assert settings.max_train_steps is not None, "call bound_steps first"
    progress = (step - settings.lr_warmup_steps) / max(1, settings.max_train_steps - settings.lr_warmup_steps)
    if name == "linear":
        return peak * max(0.0, 1 - progress)
    if name == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":
        turn = settings.lr_num_cycles * progress % 1.0
        return 0.0 if progress >= 1 else peak * max(0.0, 0.5 * (1 + math.cos(math.pi * turn)))
    assert name == "polynomial"
    return LR_END + (peak - LR_END) * max(0.0, 1 - progress) ** settings.lr_power


def before_local_term(settings: TrainSettings) -> TrainSettings:
    """Return the settings of the steps before the local term, for a ``loss.start`` above 0."""
    own = LossConfig()  # of fields that a loss without a local term may not have
    loss = replace(settings.loss, filter="none", start=0.0, margin=own.margin, tolerances=own.tolerances)
    return replace(settings, loss=loss)


def first_local_step(settings: TrainSettings, before: Mapping[str, Any] | None = None) -> int:
    """Return the first step with the local term, by ``loss.start``.

    before: what the checkpoint to continue from records of its run. With the same ``loss.start``, the step stays where
    it was, also in a run of another length.
    """
    start, steps = settings.loss.start, settings.steps
    recorded = section(before or {}, "settings")
    if before and section(recorded, "loss").get("start") == start:
        if (known := before.get(FIRST_LOCAL)) is not None:
            return int(known)
        steps = recorded.get("max_train_steps") or steps
    return math.ceil(start * steps)


def section(before: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a manifest; empty if it is missing or no mapping."""
    found = before.get(name)
    return found if isinstance(found, Mapping) else {}


def bound_steps(settings: TrainSettings, samples: int, processes: int = 1) -> TrainSettings:
    """Return the settings with ``max_train_steps`` as a number: at least 1, and at most ``num_train_epochs`` epochs of
    ``samples`` on ``processes``."""
    steps = epoch_steps(settings, samples, processes)
    if steps is None:
        return settings
    return replace(settings, max_train_steps=min(steps, settings.max_train_steps or steps))


def epoch_steps(settings: TrainSettings, samples: int, processes: int = 1) -> int | None:
    """Return how many steps ``num_train_epochs`` epochs of ``samples`` make; None if the setting is None."""
    if settings.num_train_epochs is None:
        return None
    per_step = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    return max(1, settings.num_train_epochs * samples // per_step)


def schedule_notes(settings: TrainSettings, samples: int, processes: int = 1) -> list[str]:
    """Return notes on a run of ``samples`` with bounded ``settings``: which of steps and epochs ends it, and a warm-up
    that does not finish."""
    notes, steps, by_epochs = [], settings.steps, epoch_steps(settings, samples, processes)
    if by_epochs is not None:
        epochs = f"num_train_epochs={settings.num_train_epochs} of {samples} examples"
        if steps < by_epochs:
            notes.append(
                f"max_train_steps={steps} sets the end: {epochs} would be {by_epochs} steps (max_train_steps=null "
                "trains all of them)"
            )
        else:
            notes.append(f"{epochs} set the end: {steps} steps")
    if settings.lr_scheduler != "constant" and settings.lr_warmup_steps >= steps:
        reached = learning_rate_at(settings, steps - 1) / settings.learning_rate if settings.learning_rate else 0
        note = (
            f"lr_warmup_steps={settings.lr_warmup_steps} is not less than the {steps} steps: the learning rate only "
            f"reaches {reached:.1%} of learning_rate={settings.learning_rate:g}"
        )
        by_default = settings.lr_warmup_steps == type(settings).lr_warmup_steps
        notes.append(note if by_default else warning(note))
    return notes
