"""Time variants in turns: every round runs each of them once, so that what else the machine does hits all alike."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from localctl.training.operations import OperationWatch
from research.layout_benchmark.cost import MIB, peak_memory, seconds

GIB = 2**30


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of ``values``, at least one."""
        low, median, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))

    def text(self, form: str = ".2f") -> str:
        """Return "median (low to high)"."""
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


class Deadline:
    """The time that a benchmark may take. Seconds of ``minutes`` count from now; None = no limit."""

    def __init__(self, minutes: float | None = None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Return the seconds that are left."""
        return float("inf") if self._end is None else self._end - time.monotonic()


class Apart:
    """A program in a process of its own that prints numbers, as a line of JSON, for each line that it reads.

    name: in the error that it has ended.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True)

    def __call__(self) -> list[float]:
        """Write a line, and return the answer."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> list[float]:
        """Wait for the next numbers. OSError if the process has ended."""
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("["):
            if not line:
                raise OSError(f"The process of {self._name!r} has ended; its own error is above.")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, deadline: Deadline | None = None
) -> dict[str, list[float]]:
    """Return the seconds of each run in each round, in the same order: process time on the CPU, wall-clock time with a
    synchronisation at both ends on a GPU. Runs must be warm already.

    With a deadline, rounds end when the next one would pass it; the first one is always made.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        begun = time.monotonic()
        for name, run in runs.items():
            times[name].append(seconds(run, device))
        if deadline is not None and deadline.left() < time.monotonic() - begun:
            break
    return times


def ratios(times: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """Return the spread of time of ``to`` / time of ``name`` over the rounds: how many times as fast ``name`` is."""
    return Spread.of([other / own for other, own in zip(times[to], times[name], strict=True)])


def step_figures(
    name: str, plain: str, times: Mapping[str, Sequence[float]], steps: int, batch: int, flops: float, peak: float
) -> dict[str, Any]:
    """Return the figures of one of several variants, by the seconds of its blocks of ``steps`` steps.

    plain: the variant that it is compared with. flops: of one image. peak: of the device, in TFLOP/s.
    """
    per_step = Spread.of([took / steps for took in times[name]])
    rate = batch / per_step.median
    faster = ratios(times, name, plain)
    return {
        "ms": 1e3 * per_step.median, "ms_low": 1e3 * per_step.low, "ms_high": 1e3 * per_step.high,
        "images_per_second": rate, "tflop_per_image": flops / 1e12, "tflops": rate * flops / 1e12,
        "share_of_peak": rate * flops / 1e12 / peak, "peak": peak,
        "faster_than": plain, "times": faster.median, "times_low": faster.low, "times_high": faster.high,
        "rounds": len(times[name]), "steps": steps,
    }  # fmt: skip


def peak_of(run: Callable[[], Any], device: torch.device) -> float:
    """Return the peak memory of ``run`` in MiB, above that in use before: allocated memory on a GPU; on a CPU the bytes
    of all live tensors that it makes, without the internal buffers of libraries."""
    if device.type == "cuda":
        found = peak_memory(run, device)
        assert found is not None
        return found
    with torch.compiler.set_stance("force_eager"), OperationWatch() as watch:  # compiled code would not be watched
        run()
    return watch.peak / MIB
