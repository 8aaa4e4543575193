"""Measure the cost of a control: time relative to plain sampling, run alternately, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_HIGH_WATER, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """The cost of a run.

    seconds: median. overhead: median over repetitions of (seconds / seconds of the plain run before it) - 1. peak:
    MiB above the memory in use before; None where the system does not report it.
    """

    seconds: float
    overhead: float
    peak: float | None


def compare_cost(run: Callable[[], Any], plain: Callable[[], Any], device: torch.device, repeats: int = 3) -> Cost:
    """Time ``plain`` and ``run`` alternately, after a warm-up run of each.

    On the CPU, this is process time over all cores, which other programs hardly disturb; on a GPU, wall-clock time.
    """
    plain()
    peak = peak_memory(run, device)
    pairs = np.array([(seconds(plain, device), seconds(run, device)) for _ in range(repeats)])
    return Cost(float(np.median(pairs[:, 1])), float(np.median(pairs[:, 1] / pairs[:, 0])) - 1, peak)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one run: process time on the CPU, wall-clock time on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(run: Callable[[], Any], device: torch.device) -> float | None:
    """Return the peak memory of ``run`` in MiB, above that in use before.

    Allocated memory on a GPU; resident memory on the CPU (Linux only, else None).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    _release_free_memory()
    try:
        _RESET.write_text("5")  # resets the high-water mark, VmHWM
        before = _resident("VmRSS")
    except OSError:
        run()
        return None
    run()
    return _resident("VmHWM") - before


def _release_free_memory() -> None:
    """Return free memory to the system, where the C library can; a run that reused it would seem to need none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> float:
    line = next(line for line in _HIGH_WATER.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
