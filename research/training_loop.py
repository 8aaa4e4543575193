"""The training loop of the small trainers, of the embedded base's parts and of the layout predictor: one schedule, one
update. What is logged, checked and saved between updates is the trainers' own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from localctl.training.loop import NotFiniteError

T = TypeVar("T")


def learning_rate_at(step: int, peak: float, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Return the learning rate of step ``step`` (0 = the first): linear warm-up, which unlike diffusers' begins above
    0, then a cosine down to ``floor`` * ``peak``. A function of the step alone, so that there is nothing to save."""
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
    """Update ``steps`` times; after each, yields how many updates were made in all, and what ``loss`` said beside the
    loss of that step.

    Raises:
        NotFiniteError: the gradient is not finite; the weights are still those of before. It ends with the advice.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        value, said = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if not torch.isfinite(clip_grad_norm_(parameters, max_norm)):
            raise NotFiniteError(f"The loss is not finite at step {step + 1}; {advice}.")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        yield step + 1, said
