"""Where on the schedule of a diffusers scheduler a call of the U-Net stands."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

# The signal that is left where a schedule says none is (rescale_betas_zero_snr): diffusers' own, in the schedulers that
# need a finite noise level. sigma is then 4096.
SIGNAL_FLOOR = 2**-24

Visits = tuple[int | None, int | None]  # see steps_of_call


def outer_step(scheduler: Any, timestep: float) -> tuple[int, int]:
    """Which of the outer sampling steps ``timestep`` belongs to, and how many there are.

    Second-order schedulers visit two timesteps in one step, and Heun visits each twice: then ``step_index``, where the
    scheduler keeps one, tells the visits apart. ValueError for a timestep that is not on the schedule.
    """
    times = _times(scheduler)
    return _outer_step(scheduler, times, _position(scheduler, times, timestep))


def steps_of_call(scheduler: Any, timestep: float, visits: Visits = (None, None)) -> tuple[int, int]:
    """The first outer step of a call of the pipeline that begins at ``timestep``, and how many outer steps it makes.

    ``visits``: what a pipeline says of it, as far as it does: how many of the schedule's timesteps it visits, which
    several count before ``denoising_end`` cuts them; and the total of its progress bar, which are outer steps, or
    timesteps where the call ends early. ValueError as for :func:`outer_step`.
    """
    times = _times(scheduler)
    position = _position(scheduler, times, timestep)
    first, num_steps = _outer_step(scheduler, times, position)
    visited, total = visits
    visited = len(times) - position if visited is None else visited
    # Of a whole call, the total is that of its outer steps; PNDM visits one timestep more than it was asked for.
    extra = len(times) - (scheduler.num_inference_steps or len(times)) if getattr(scheduler, "order", 1) == 1 else 0
    if total is not None and total != num_steps - first and total + extra < visited:
        visited = total
    # Of several visits it may be the last that this call begins at.
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
    # count below is out by one at most.
    distinct = [time for time, _ in itertools.groupby(times)]
    position = distinct.index(times[position])
    num_steps = min(scheduler.num_inference_steps or len(distinct), len(distinct))
    return position * num_steps // len(distinct), num_steps


def sigma_at(scheduler: Any, timestep: float) -> float:
    """The noise level of ``timestep`` in variance-exploding coordinates: sigma = sqrt((1 - abar) / abar), > 0.

    Schedulers that choose their noise levels themselves (``sigmas``: Euler, DPM++, LMS, with Karras' spacing too) are
    taken at their word, the others by ``alphas_cumprod`` at the timestep. Where no signal is left, sigma is what
    ``SIGNAL_FLOOR`` makes it. ValueError for a timestep off the schedule.
    """
    times = _times(scheduler)
    position = _position(scheduler, times, timestep)
    sigmas = getattr(scheduler, "sigmas", None)
    # DPM2 keeps the levels of the steps in between elsewhere; the timestep says them, too.
    if sigmas is not None and len(sigmas) > position and not hasattr(scheduler, "sigmas_interpol"):
        sigma = float(sigmas[position])
        return sigma if math.isfinite(sigma) else math.exp(_log_level(0.0))
    last = len(scheduler.alphas_cumprod) - 1
    timestep = min(max(timestep, 0.0), float(last))
    below = int(timestep)  # this runs at every call of the U-Net, so only the two neighbours are looked at
    low, high = (_log_level(float(scheduler.alphas_cumprod[index])) for index in (below, min(below + 1, last)))
    return math.exp(low + (timestep - below) * (high - low))


def _log_level(abar: float) -> float:
    abar = min(max(abar, SIGNAL_FLOOR), 1 - SIGNAL_FLOOR)
    return math.log((1 - abar) / abar) / 2


def _times(scheduler: Any) -> list[float]:
    return torch.as_tensor(scheduler.timesteps).double().tolist()


def _position(scheduler: Any, times: list[float], timestep: float) -> int:
    """The index of ``timestep`` in the schedule's ``times``."""
    found = [position for position, time in enumerate(times) if time == timestep]
    if not found:
        raise ValueError(f"The U-Net was called at timestep {timestep}, which is not on the pipeline's schedule.")
    # Before the first step only the index to begin at is known, and that only where a call does not begin at 0.
    for name in ("step_index", "begin_index"):
        index: Any = getattr(scheduler, name, None)
        if index is not None:
            return index if index in found else found[0]
    return found[0]
