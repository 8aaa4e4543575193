"""Measure a training step on a CPU that other programs use, too: with the batch whole or in halves, and for two ways in
which OpenMP's threads wait.

  python -m research.benchmarks.busy_machine                  # on an otherwise idle machine: some 5 minutes

The four trainings are loaded at once and run in turns, beside no, one, two ... busy processes. Wall-clock time per step
of 16 cached scenes of the embedded base: median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.threads import CHOICES, SPINS
from research.benchmarks.timing import Apart
from research.flags import check_least
from research.page import table

PROGRAM = "research.benchmarks.busy_machine"
SPINNING, YIELDING = "libgomp's default", f"GOMP_SPINCOUNT={SPINS}"
WAYS = [(batch, waiting) for batch in ("whole", "halves") for waiting in (SPINNING, YIELDING)]
BUSY = "while True: pass"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes beside the training")
    add("--rounds", type=int, default=5, help="turns of each training")
    add("--steps", type=int, default=4, help="steps in a turn")
    add("--threads", type=int, default=2, help="of the training")
    add("--train_batch_size", type=int, default=16)
    add("--one", choices=("whole", "halves"), help=argparse.SUPPRESS)  # the work of a child process
    args = parser.read(argv)
    check_least(args, {"rounds": 1, "steps": 1, "threads": 1, "train_batch_size": 2}, "--")
    return args


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table; return 0, or 2 after a user's error."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse(words)
    if args.one:
        train_in_turns(args)
        return 0
    rows = []
    with ExitStack() as stack:
        trainings = {way: stack.enter_context(closing(_training(*way, words))) for way in WAYS}
        for training in trainings.values():
            training.answer()  # it is warm
        for busy in args.busy:
            times = _times(trainings, busy, args.rounds)
            rows.append((f"beside {busy} busy processes", [_cell(times[way]) for way in WAYS]))
    columns = [f"{batch}, {waiting}" for batch, waiting in WAYS]
    print("\n".join(table(columns, rows, f"ms per step, {args.threads} threads")))
    return 0


def _times(trainings: dict[Any, Apart], busy: int, rounds: int) -> dict[Any, list[float]]:
    """Return the seconds of all steps of each training beside ``busy`` processes."""
    times: dict[Any, list[float]] = {way: [] for way in trainings}
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        for _ in range(rounds):
            for way, turn in trainings.items():
                times[way] += turn()
    finally:
        for other in others:
            other.kill()
            other.wait()
    return times


def _cell(seconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{1000 * middle:.0f} ({1000 * low:.0f} to {1000 * high:.0f})"


def _training(batch: str, waiting: str, words: Sequence[str]) -> Apart:
    """Return a training that waits for its turns."""
    kept = {name: value for name, value in os.environ.items() if name not in (*CHOICES, "OMP_NUM_THREADS")}
    chosen = {"TQDM_DISABLE": "1", "GOMP_SPINCOUNT": SPINS} if waiting == YIELDING else {"TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", PROGRAM, *words, "--one", batch]
    return Apart(f"{batch}, {waiting}", command, kept | chosen)


def train_in_turns(args: argparse.Namespace) -> None:
    """Train. When every scene has been visited, and then after every ``args.steps`` steps, print their seconds as JSON
    and wait for a line on stdin."""
    from localctl.api import train_settings
    from localctl.training import halves
    from localctl.training.loop import prepare

    if args.one == "whole":
        halves.is_divided = lambda rows: False
    seconds: list[float] = []  # of the steps since the last turn
    begun = time.perf_counter()

    def after_step(number: int) -> bool:
        nonlocal begun
        seconds.append(time.perf_counter() - begun)
        if number > args.steps and len(seconds) >= args.steps:
            print(json.dumps(seconds), flush=True)
            seconds.clear()
            if not sys.stdin.readline():
                return True
        begun = time.perf_counter()
        return False

    count, size = f"data.count={args.steps * args.train_batch_size}", f"train_batch_size={args.train_batch_size}"
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("report_to=none", "validation_steps=0", "checkpointing_steps=0", f"output_dir={folder}")
        prepare(train_settings(*quiet, count, size, f"cpu_threads={args.threads}")).train(after_step)


if __name__ == "__main__":
    sys.exit(main())
