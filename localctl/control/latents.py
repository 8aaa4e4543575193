"""A diffusers scheduler: the place of a denoiser call on its schedule, and shifts of its latents between steps.

A shift is added both to the denoiser's input and in the scheduler's own step.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from localctl.diffusion import is_flow

# Used in place of abar = 0 (rescale_betas_zero_snr), as diffusers' schedulers with finite noise levels do; sigma is
# then 4096.
SIGNAL_FLOOR = 2**-24

# The scale of the scheduler's latents: variance preserving, as for the denoiser, or exploding, x = z / sqrt(abar).
_PRESERVING = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler",)  # those of flow matching have the denoiser's scale
_ROUNDED = 2**-7  # a timestep's error in bfloat16, as a share of all
_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")

Visits = tuple[int | None, int | None]  # see steps_of_call


class Schedule:
    """Reads a scheduler's timesteps, and their place in a call, without waiting for a GPU at each step."""

    def __init__(self) -> None:
        self._read: tuple[Tensor, list[float]] | None = None  # the scheduler's timesteps and their values

    def times(self, scheduler: Any) -> list[float]:
        """Return the values of the scheduler's timesteps, read once as long as they are the same tensor."""
        timesteps = torch.as_tensor(scheduler.timesteps)
        if self._read is None or self._read[0] is not timesteps:
            self._read = (timesteps, _times(scheduler))
        return self._read[1]

    def time(self, scheduler: Any, timestep: Tensor | float) -> float:
        """Return the value of a timestep: read from the scheduler's timesteps if it is an element of them, as in the
        loops of pipelines."""
        times = self.times(scheduler)
        if isinstance(timestep, Tensor) and self._read is not None:
            every = self._read[0]
            same = timestep.dtype == every.dtype and timestep.untyped_storage().data_ptr() == _address(every)
            place = timestep.storage_offset() - every.storage_offset()
            if (
                same
                and _address(every)
                and timestep.numel() == 1
                and every.stride() == (1,)
                and 0 <= place < len(times)
            ):
                return times[place]
        value = float(torch.as_tensor(timestep).flatten()[0])
        return times[_position(scheduler, times, value)] if is_flow(scheduler) else value


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def outer_step(scheduler: Any, timestep: float, times: list[float] | None = None) -> tuple[int, int]:
    """Return the outer sampling step that ``timestep`` belongs to, and the number of outer steps.

    Second-order schedulers visit two timesteps in one step, and Heun visits each twice: then the scheduler's
    ``step_index``, if it has one, tells the visits apart. ``times``: the values of the scheduler's timesteps, if they
    are known. ValueError for a timestep that is not on the schedule.
    """
    times = _times(scheduler) if times is None else times
    return _outer_step(scheduler, times, _position(scheduler, times, timestep))


def steps_of_call(
    scheduler: Any, timestep: float, visits: Visits = (None, None), times: list[float] | None = None
) -> tuple[int, int]:
    """Return the first outer step of a pipeline call that begins at ``timestep``, and its number of outer steps.

    ``visits``: two counts that the pipeline may give, each or None. The number of the schedule's timesteps that the
    call visits, which several pipelines count before ``denoising_end`` shortens them; and the total of the progress
    bar, which counts outer steps, or timesteps where the call ends early. ``times`` and ValueError as for
    :func:`outer_step`.
    """
    times = _times(scheduler) if times is None else times
    position = _position(scheduler, times, timestep)
    first, num_steps = _outer_step(scheduler, times, position)
    visited, total = visits
    visited = len(times) - position if visited is None else visited
    # For a complete call, the total counts outer steps; PNDM visits one timestep more than num_inference_steps.
    extra = len(times) - (scheduler.num_inference_steps or len(times)) if getattr(scheduler, "order", 1) == 1 else 0
    if total is not None and total != num_steps - first and total + extra < visited:
        visited = total
    # If the schedule visits this timestep several times, the call may begin at the last visit.
    latest = len(times) - 1 - times[::-1].index(timestep)
    if latest + visited >= len(times):
        return first, num_steps - first
    last, _ = _outer_step(scheduler, times, position + max(visited, 1) - 1)
    return first, last - first + 1


def _outer_step(scheduler: Any, times: list[float], position: int) -> tuple[int, int]:
    order: int = getattr(scheduler, "order", 1)
    if order > 1:
        return position // order, -(-len(times) // order)
    # PNDM repeats a timestep while it warms up. If it starts with Runge-Kutta, it has half steps as well, and the
    # count below is off by at most one.
    distinct = [time for time, _ in itertools.groupby(times)]
    position = distinct.index(times[position])
    num_steps = min(scheduler.num_inference_steps or len(distinct), len(distinct))
    return position * num_steps // len(distinct), num_steps


def sigma_at(scheduler: Any, timestep: float, times: list[float] | None = None) -> float:
    """Return the noise level of ``timestep`` in variance-exploding coordinates: sigma = sqrt((1 - abar) / abar), > 0.

    With flow matching, s / (1 - s), where 1 - s is at least the root of ``SIGNAL_FLOOR``.

    For schedulers that have their own noise levels (``sigmas``: Euler, DPM++, LMS, also with Karras' spacing) these are
    used; for others, ``alphas_cumprod`` at the timestep. Where no signal is left, abar is ``SIGNAL_FLOOR``. ``times``
    and ValueError as for :func:`outer_step`.
    """
    times = _times(scheduler) if times is None else times
    position = _position(scheduler, times, timestep)
    sigmas = getattr(scheduler, "sigmas", None)
    # DPM2 stores the levels of its intermediate steps elsewhere; for it, alphas_cumprod at the timestep is used.
    if sigmas is not None and len(sigmas) > position and not hasattr(scheduler, "sigmas_interpol"):
        sigma = float(sigmas[position])
        if is_flow(scheduler):
            return sigma / max(1 - sigma, math.sqrt(SIGNAL_FLOOR))
        return sigma if math.isfinite(sigma) else math.exp(_log_level(0.0))
    last = len(scheduler.alphas_cumprod) - 1
    timestep = min(max(timestep, 0.0), float(last))
    below = int(timestep)  # this runs at every call of the denoiser, so only the two neighbours are read
    low, high = (_log_level(float(scheduler.alphas_cumprod[index])) for index in (below, min(below + 1, last)))
    return math.exp(low + (timestep - below) * (high - low))


def _log_level(abar: float) -> float:
    abar = min(max(abar, SIGNAL_FLOOR), 1 - SIGNAL_FLOOR)
    return math.log((1 - abar) / abar) / 2


def _times(scheduler: Any) -> list[float]:
    return torch.as_tensor(scheduler.timesteps).double().tolist()


def _position(scheduler: Any, times: list[float], timestep: float) -> int:
    """Return the index of ``timestep`` in the schedule's ``times``."""
    # Timesteps of flow matching are no whole numbers, and pipelines round them to the denoiser's dtype, by which one of
    # many may become another's. The scheduler counts its steps.
    place = _next_place(scheduler) if is_flow(scheduler) else None
    if place is not None and _rounded(scheduler, times, timestep, place):
        return place
    found = [position for position, time in enumerate(times) if time == timestep]
    if not found and is_flow(scheduler) and _rounded(scheduler, times, timestep, 0):
        return 0  # before the first step
    if not found:
        raise ValueError(
            f"The denoiser was called at timestep {timestep}, which is not on the pipeline's schedule; call it at the "
            "scheduler's timesteps."
        )
    # Before the first step only begin_index is known, and only where a call does not begin at 0.
    place = _next_place(scheduler)
    return place if place in found else found[0]


def _rounded(scheduler: Any, times: list[float], timestep: float, place: int) -> bool:
    """Return whether a timestep may be the one at ``place``, rounded to bfloat16."""
    return place < len(times) and abs(times[place] - timestep) <= _ROUNDED * scheduler.config.num_train_timesteps


def _next_place(scheduler: Any) -> int | None:
    """Return the index of the timestep that the scheduler's next step is for; None where it is not known."""
    known = [getattr(scheduler, name, None) for name in ("step_index", "begin_index")]
    return next((int(index) for index in known if index is not None), None)


def check_shiftable(scheduler: Any) -> None:
    """Raise a ValueError for a scheduler that would lose a shift of the latents, or is not known to keep it."""
    name = type(scheduler).__name__
    check_shiftable_kind(name)
    if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        raise ValueError(
            "PNDMScheduler starts with Runge-Kutta steps, which would lose a control's shift of the latents; set "
            "skip_prk_steps=True."
        )


def check_shiftable_kind(name: str) -> None:
    """Do the part of :func:`check_shiftable` that needs only the name of the scheduler's class."""
    if "FlowMatch" in name and name not in _FLOW:
        raise ValueError(
            f"{name} would lose a control's shift of the latents between steps; use {_FLOW[0]}, the scheduler of the "
            "flow-matching bases."
        )
    if name not in (*_PRESERVING, *_EXPLODING, *_FLOW):
        raise ValueError(
            f"{name} would lose a control's shift of the latents between steps; use DDIM, DDPM, PNDM, Euler, Euler "
            "ancestral, DPM++ 2M (DPMSolverMultistepScheduler) or LMS."
        )


class SchedulerShift:
    """Adds a shift to the ``sample`` of the next ``scheduler.step`` of one scheduler, once.

    The method is wrapped on the instance from :meth:`add` until that step, or until :meth:`undo`.
    """

    def __init__(self) -> None:
        self._scheduler: Any = None
        self._own: Any = None

    @property
    def pending(self) -> bool:
        """Whether the scheduler's step with the last shift is still to come."""
        return self._scheduler is not None

    def add(self, scheduler: Any, shift: Tensor, sigma: float) -> None:
        """Wrap ``scheduler.step``. ``shift``: as the scheduler's latents, in the denoiser's scale, z; ``sigma``: the
        noise level."""
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
        """Remove the wrapper; does nothing without one."""
        if self._scheduler is None:
            return
        if self._own is None:
            del self._scheduler.step
        else:
            self._scheduler.step = self._own
        self._scheduler = self._own = None


def _shift_first_sample(scheduler: Any, timestep: Any, shift: Tensor) -> None:
    """Shift the latents that PNDM stored in its first step, from which its second call repeats that step.

    They are one step noisier; a step scales its sample by the ratio of sqrt(abar), so the result moves by ``shift``.
    """
    first_sample = scheduler.cur_sample
    if scheduler.counter != 1 or first_sample is None:
        return
    abars = scheduler.alphas_cumprod
    before = int(timestep) + scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    ratio = float((abars[before] / abars[int(timestep)]).sqrt())
    scheduler.cur_sample = first_sample + shift.to(first_sample) * ratio
