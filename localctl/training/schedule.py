"""How long to train, and the learning rate of each step: functions of the settings and the step alone."""

from __future__ import annotations

import math
from dataclasses import replace

from localctl.messages import warning
from localctl.training.settings import LR_END, TrainSettings


def learning_rate_at(settings: TrainSettings, step: int) -> float:
    """Compute the learning rate of step ``step`` (0 = the first): linear warm-up, then as ``lr_scheduler`` says, equal
    to diffusers' ``get_scheduler``.

    There is nothing to save, and nothing that several processes could advance several times. (``get_scheduler``'s own
    factors round differently, so a run that goes on from an older checkpoint would not be bit-equal.)
    """
    name, peak = settings.lr_scheduler, settings.learning_rate
    if name == "constant":
        return peak
    if step < settings.lr_warmup_steps:
        return peak * step / settings.lr_warmup_steps
    if name == "constant_with_warmup":
        return peak
    assert settings.max_train_steps is not None, "bound_steps comes first"
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


def bound_steps(settings: TrainSettings, samples: int, processes: int = 1) -> TrainSettings:
    """Return the settings with ``max_train_steps`` as a number: at most as many steps as make ``num_train_epochs``
    epochs of ``samples`` on ``processes``, never more than that, and at least one."""
    steps = epoch_steps(settings, samples, processes)
    if steps is None:
        return settings
    return replace(settings, max_train_steps=min(steps, settings.max_train_steps or steps))


def epoch_steps(settings: TrainSettings, samples: int, processes: int = 1) -> int | None:
    """How many steps ``num_train_epochs`` epochs of ``samples`` are; None without such a setting."""
    if settings.num_train_epochs is None:
        return None
    per_step = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    return max(1, settings.num_train_epochs * samples // per_step)


def schedule_notes(settings: TrainSettings, samples: int, processes: int = 1) -> list[str]:
    """Return what of the bound ``settings`` of a run on ``samples`` may not be what was meant: which of steps and
    epochs sets the end, and a warm-up that is not over by then."""
    notes, steps, by_epochs = [], settings.steps, epoch_steps(settings, samples, processes)
    if by_epochs is not None:
        epochs = f"num_train_epochs={settings.num_train_epochs} of {samples} examples"
        if steps < by_epochs:
            notes.append(
                f"max_train_steps={steps} sets the end: {epochs} would be {by_epochs} steps (max_train_steps=null "
                "makes them all)"
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
