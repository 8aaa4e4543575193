"""How long to train, and the learning rate of each step: functions of the settings and the step alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localctl.training.settings import TrainSettings

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LR_END = 1e-7  # of the polynomial schedule, as in diffusers


def learning_rate_at(settings: TrainSettings, step: int) -> float:
    """The learning rate of step ``step`` (0 = the first): linear warm-up, then as ``lr_scheduler`` says, equal to
    diffusers' ``get_scheduler``.

    There is nothing to save, and nothing that several processes could advance several times.
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
    """The settings with ``max_train_steps`` as a number: at most as many steps as make ``num_train_epochs`` epochs of
    ``samples`` on ``processes``, never more than that, and at least one."""
    if settings.num_train_epochs is None:
        return settings
    per_step = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    steps = max(1, settings.num_train_epochs * samples // per_step)
    return replace(settings, max_train_steps=min(steps, settings.max_train_steps or steps))
