"""Shifts of the latents between two steps of a pipeline: at the U-Net's input and in the scheduler's step alike."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

from torch import Tensor

# What the scheduler's latents are: variance preserving, as the U-Net sees them, or exploding, x = z / sqrt(abar).
_PRESERVING = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")


def check_shiftable(scheduler: Any) -> None:
    """ValueError for a scheduler that would lose a shift of the latents, or whose steps are not known to keep it."""
    name = type(scheduler).__name__
    check_shiftable_kind(name)
    if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        raise ValueError(
            "PNDMScheduler starts with Runge-Kutta steps, which lose what a control moves; set skip_prk_steps=True."
        )


def check_shiftable_kind(name: str) -> None:
    """As :func:`check_shiftable`, as far as the name of the scheduler's class says it."""
    if name not in (*_PRESERVING, *_EXPLODING):
        raise ValueError(
            f"{name} does not carry latents that a control moves from step to step; use DDIM, DDPM, PNDM, Euler, "
            "Euler ancestral, DPM++ 2M (DPMSolverMultistepScheduler) or LMS."
        )


class SchedulerShift:
    """Adds a shift to the ``sample`` of the next ``scheduler.step``, once, on this one scheduler.

    The wrapper stands on the instance from :meth:`add` until that step, or until :meth:`undo`.
    """

    def __init__(self) -> None:
        self._scheduler: Any = None
        self._own: Any = None

    def add(self, scheduler: Any, shift: Tensor, sigma: float) -> None:
        """``shift`` (n, c, h, w) in the U-Net's scale, z; ``sigma``: the noise level of the step."""
        self.undo()
        exploding = type(scheduler).__name__ in _EXPLODING
        if exploding:
            shift = shift * math.sqrt(sigma**2 + 1)  # x = z / sqrt(abar)
        step = scheduler.step
        signature = inspect.signature(step)

        @functools.wraps(step)
        def shifted(*args: Any, **kwargs: Any) -> Any:
            self.undo()
            bound = signature.bind(*args, **kwargs)
            sample = bound.arguments["sample"]
            bound.arguments["sample"] = sample + shift.to(sample)
            if type(scheduler).__name__ == "PNDMScheduler":
                _shift_first_sample(scheduler, bound.arguments["timestep"], shift)
            return step(*bound.args, **bound.kwargs)

        self._scheduler, self._own = scheduler, vars(scheduler).get("step")
        scheduler.step = shifted

    def undo(self) -> None:
        """Take the wrapper away; without one, nothing happens."""
        if self._scheduler is None:
            return
        if self._own is None:
            del self._scheduler.step
        else:
            self._scheduler.step = self._own
        self._scheduler = self._own = None


def _shift_first_sample(scheduler: Any, timestep: Any, shift: Tensor) -> None:
    """PNDM's second call repeats its first step from the latents kept then, so the shift has to be made there.

    They are one step noisier; a step scales its sample by the ratio of sqrt(abar), so the result moves by ``shift``.
    """
    kept = scheduler.cur_sample
    if scheduler.counter != 1 or kept is None:
        return
    abars = scheduler.alphas_cumprod
    before = int(timestep) + scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    ratio = float((abars[before] / abars[int(timestep)]).sqrt())
    scheduler.cur_sample = kept + shift.to(kept) * ratio
