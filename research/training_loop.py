"""The training loop of the embedded base's parts and of the layout predictor: learning rate schedule and update.

Each trainer logs, validates and saves between updates in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from localctl.training.loop import NotFiniteError

T = TypeVar("T")


@dataclass(kw_only=True)
class DescentConfig:
    """Settings that all trainers of the embedded base's parts share.

    ema: decay of the average of the weights; 0 = none. final_fraction: of the peak learning rate, at the end.
    """

    learning_rate: float
    weight_decay: float = 0.01
    ema: float = 0.0
    seed: int = 0
    final_fraction: float = 0.02


def learning_rate_at(step: int, peak: float, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Return the learning rate of step ``step`` (0 = the first).

    A linear warm-up, which unlike diffusers' starts above 0, then a cosine down to ``floor`` * ``peak``. It depends on
    the step alone, so a checkpoint needs no scheduler state.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def updates(
    optimizer: torch.optim.Optimizer,
    steps: range,
    learning_rate: Callable[[int], float],
    loss: Callable[[int], tuple[Tensor, T]],
    max_norm: float = 1.0,
    advice: str = "lower the learning rate and resume",
) -> Iterator[tuple[int, T]]:
    """Make the updates ``steps``; after each, yield the number of updates so far and the details of its loss.

    Args:
        loss: returns the loss of a step and its details, whatever the trainer logs.
        advice: end of the message of NotFiniteError.

    Raises:
        NotFiniteError: the gradient is not finite; the weights are those of the step before.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        value, details = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if not torch.isfinite(clip_grad_norm_(parameters, max_norm)):
            raise NotFiniteError(f"The loss is not finite at step {step + 1}; {advice}.")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        yield step + 1, details
