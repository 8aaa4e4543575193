"""Compare ways to train the adapter of command 1: the control they reach on validation scenes, and what they cost.

  python -m research.benchmarks.command_one --output_dir outputs/command_one                  # on a CPU: hours
  python -m research.benchmarks.command_one --output_dir OUT --parallel 10 --minutes 3        # at once, on a GPU
  python -m research.benchmarks.command_one --output_dir OUT --report                         # the table again

Every variant is a training with some other settings, in a process of its own. ``OUT`` gets a file for each when it is
measured, so that a run that ends early loses only what is under way, and the same command goes on with the rest.
Choices are made here; the claim is measured on the test scenes, by ``research.control_share``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.evaluation.provenance import read_json, write_json
from localctl.jobs.variants import file_label
from localctl.messages import loading
from research.flags import check_least, make_folder

PROGRAM = "research.benchmarks.command_one"
BASELINE, FLOOR = "as before", "floor"
BEFORE = (
    "max_train_steps=900", "train_batch_size=16", "learning_rate=3e-3", "lr_warmup_steps=50", "timestep_sampling=cubic",
)  # fmt: skip
SEEDS = (0, 1, 2)
SHORT = ("max_train_steps=540",)  # 0.6 of the images, as the next two
OF_8 = ("max_train_steps=1080", "train_batch_size=8")
OF_4 = ("max_train_steps=2160", "train_batch_size=4", "learning_rate=2e-3")
LARGE, INSIDE = ("mask.min_area=0.25",), ("loss.mask_denoising=true",)
EMPTY, AVERAGE = ("proportion_empty_prompts=0.3",), ("use_ema=true", "ema_decay=0.99")
# Name -> settings over those of BEFORE. Each is trained with the first seed before any is trained with the second.
VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "short": SHORT,
    "of 8": OF_8,
    "of 8, finest level x4": (*OF_8, "adapter.level_weights=[4, 1, 1]"),
    "of 8, levels x4, x1, x0.3": (*OF_8, "adapter.level_weights=[4, 1, 0.3]"),
    "of 8, levels x10, x1, x0.3": (*OF_8, "adapter.level_weights=[10, 1, 0.3]"),
    "of 8, lr 2e-3, finest level x4": (*OF_8, "adapter.level_weights=[4, 1, 1]", "learning_rate=2e-3"),
    "of 4": OF_4,
    "of 8, lr 2e-3": (*OF_8, "learning_rate=2e-3"),
    "of 8, lr 5e-3": (*OF_8, "learning_rate=5e-3"),
    "of 8, loss inside": (*OF_8, *INSIDE),
    "of 8, empty prompts": (*OF_8, *EMPTY),
    "of 8, averaged": (*OF_8, *AVERAGE),
    "of 8, uniform": (*OF_8, "timestep_sampling=uniform"),
    "of 8, 720 steps": (*OF_8, "max_train_steps=720"),
    "of 4, lr 3e-3": (*OF_4, "learning_rate=3e-3"),
    "of 4, 1440 steps": (*OF_4, "max_train_steps=1440"),
    "of 8, large masks": (*OF_8, *LARGE),
    "of 8, linear": (*OF_8, "lr_scheduler=linear"),
    "of 8, quick moments": (*OF_8, "adam_beta2=0.99"),
    "of 8, local 0.3": (*OF_8, "loss.weight=0.3"),
    "of 8, large masks, loss inside": (*OF_8, *LARGE, *INSIDE),
    "of 8, 2000 scenes": (*OF_8, "data.count=2000"),
    "short, lr 5e-3": (*SHORT, "learning_rate=5e-3"),
}


@dataclass(frozen=True)
class Job:
    """A training to measure, or ``FLOOR``: the images of the base and of the VAE, which all are compared with."""

    name: str
    seed: int = 0

    @property
    def label(self) -> str:
        return file_label(f"{self.name} {self.seed}")

    @property
    def settings(self) -> tuple[str, ...]:
        return (*BEFORE, *VARIANTS[self.name], f"seed={self.seed}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags. ValueError for values out of range, unknown variants or a folder that cannot be made."""
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder of the measurements")
    add("--minutes", type=float, help="stop then, and measure nothing that is not finished; default: no limit")
    add("--parallel", type=int, default=1, help="trainings at once")
    add("--only", nargs="+", default=list(VARIANTS), metavar="NAME", help=f"of: {'; '.join(VARIANTS)}")
    add("--seeds", nargs="+", type=int, default=list(SEEDS))
    add("--count", type=int, default=100, help="validation scenes")
    add("--num_inference_steps", type=int, default=20, help="sampling steps of each image")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all trainings, such as allow_tf32=true")
    add("--report", action="store_true", help="only print the table of the rows that are there")
    add("--one", help=argparse.SUPPRESS)  # the job of a child process, as NAME/SEED
    args = parser.read(argv)
    check_least(args, {"count": 2, "num_inference_steps": 1, "parallel": 1, "minutes": 0}, "--")
    if unknown := [name for name in args.only if name not in VARIANTS]:
        raise ValueError(f"Unknown variant {unknown[0]!r}; choose from {'; '.join(VARIANTS)}.")
    make_folder(args.output_dir)
    return args


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, and print the table; return 0, or 2 after a user's error."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse(words)
    if args.one:
        name, _, seed = args.one.rpartition("/")
        measure(Job(name, int(seed)), args)
        return 0
    if not args.report:
        run(jobs(args), args, words)
    print("\n".join(report(read_rows(args.output_dir))))
    return 0


def jobs(args: argparse.Namespace) -> list[Job]:
    """Return what is not measured yet, the most worthwhile first."""
    done = {(row["name"], row["seed"]) for row in read_rows(args.output_dir)}
    wanted = [Job(FLOOR), *(Job(name, seed) for seed in args.seeds for name in args.only)]
    return [job for job in wanted if (job.name, job.seed) not in done]


def run(waiting: Sequence[Job], args: argparse.Namespace, words: Sequence[str]) -> None:
    """Run the jobs, ``args.parallel`` at once, until all are done or the time is over."""
    end = time.monotonic() + (60 * args.minutes if args.minutes else float("inf"))
    queue, under_way = list(waiting), list[tuple[Job, subprocess.Popen[bytes]]]()
    with _ended(under_way):
        while (queue or under_way) and time.monotonic() < end:
            while queue and len(under_way) < args.parallel:
                under_way.append((queue[0], _start(queue.pop(0), args, words)))
            for job, process in [pair for pair in under_way if pair[1].poll() is not None]:
                under_way.remove((job, process))
                state = f"failed, see {args.output_dir / job.label}.log" if process.returncode else "done"
                print(f"{job.name}, seed {job.seed}: {state}", flush=True)
            time.sleep(0.2)
    for job in [*(job for job, _ in under_way), *queue]:
        print(f"{job.name}, seed {job.seed}: no time left")


@contextmanager
def _ended(processes: Sequence[tuple[Job, subprocess.Popen[bytes]]]) -> Iterator[None]:
    """Within, processes run; those that are left at the end are killed."""
    try:
        yield
    finally:
        for _, process in processes:
            process.kill()
            process.wait()


def _start(job: Job, args: argparse.Namespace, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the process of a job, with one thread if there are several jobs at once."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    if args.parallel > 1:
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", PROGRAM, *words, "--one", f"{job.name}/{job.seed}"]
    with (args.output_dir / f"{job.label}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def measure(job: Job, args: argparse.Namespace) -> None:
    """Train and measure one job, and write its file."""
    with loading():
        from research.benchmarks.command_one_job import floor_scores, trained_scores

    if job.name == FLOOR:
        found = floor_scores(args.count, args.num_inference_steps)
    else:
        found = trained_scores((*job.settings, *args.set), args.count, args.num_inference_steps)
    row = {"name": job.name, "seed": job.seed, "count": args.count, "num_inference_steps": args.num_inference_steps}
    write_json(args.output_dir / f"{job.label}.json", row | found)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return what was measured so far."""
    return [read_json(path, "measurement") for path in sorted(folder.glob("*.json"))]


def report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table: control, its difference from the baseline's mean over the same scenes, and cost."""
    from research.benchmarks.command_one_job import table_of

    floor = next((row for row in rows if row["name"] == FLOOR), None)
    measured = {name: [row for row in rows if row["name"] == name] for name in VARIANTS}
    if floor is None or not any(measured.values()):
        return ["Nothing can be compared yet."]
    return table_of(floor, {name: found for name, found in measured.items() if found}, BASELINE)


if __name__ == "__main__":
    sys.exit(main())
