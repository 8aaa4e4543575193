"""What a control costs: time over plain sampling, taken in turns, and the most memory that a run needs."""

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
    """seconds: median of a run. overhead: median over repetitions of (seconds / those of the plain run beside it) - 1.
    peak: MiB above what was held before; None where the system does not say."""

    seconds: float
    overhead: float
    peak: float | None


def compare_cost(run: Callable[[], Any], plain: Callable[[], Any], device: torch.device, repeats: int = 3) -> Cost:
    """Run ``plain`` and ``run`` in turns, after one run of each that does not count.

    On the CPU, seconds are those of this process on all its cores, which other programs hardly disturb; on a GPU those
    of the clock.
    """
    plain()
    peak = peak_memory(run, device)
    pairs = np.array([(seconds(plain, device), seconds(run, device)) for _ in range(repeats)])
    return Cost(float(np.median(pairs[:, 1])), float(np.median(pairs[:, 1] / pairs[:, 0])) - 1, peak)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run: of the process on the CPU, of the clock on a GPU."""
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
    """MiB that ``run`` holds at most, above what was held before: allocated on a GPU, resident on the CPU (Linux
    only, else None)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    _give_back_free_memory()
    try:
        _RESET.write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
    except OSError:
        run()
        return None
    run()
    return _resident("VmHWM") - before


def _give_back_free_memory() -> None:
    """To the system, where the C library can; else a run that fits into it would seem to need none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> float:
    line = next(line for line in _HIGH_WATER.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
