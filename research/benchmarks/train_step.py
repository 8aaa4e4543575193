"""Compare training steps on the embedded base: cached, live, without each trick, and the step of diffusers' script.

  python -m research.benchmarks.train_step

The plain step encodes every image and caption and leaves the U-Net's gradients on. Each variant has a process of its
own, with the memory allocator as its users have it, and all take turns, on one thread; ratios are of process time,
which other programs hardly disturb. Then each variant runs alone, for its peak memory beyond that of Python, the
libraries and the data; and the product's training runs with its loader, for the share of time that it waits for data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from localctl.allocator import keep_freed_memory
from localctl.architectures import read_shape
from localctl.bases import BaseConfig
from localctl.data import MaskedSamples, MicroScenes, SampleRef, collate
from localctl.data.sample import Batch
from localctl.messages import no_progress_bars
from localctl.pipelines import choose_pil_processors, load_pipeline
from localctl.training.loop import prepare
from localctl.training.settings import TrainSettings
from localctl.training.trackers import read_stats
from research.benchmarks.steps import (
    CACHED,
    COMPILED,
    CONTIGUOUS,
    LIVE,
    LIVE_COMPILED,
    ONE_BY_ONE,
    PLAIN,
    PLAIN_FROZEN,
    WITHOUT,
    Steps,
    Variant,
    with_encodings,
    with_random_encodings,
)
from research.benchmarks.timing import Apart, Spread, ratios
from research.layout_benchmark.cost import peak_memory, seconds

PLAIN_KEPT = Variant("plain step, freed memory kept", cached=False, plain=True)
RETURNED = Variant("cached, freed memory returned")
COMPILING = (COMPILED, LIVE_COMPILED)  # minutes before their first step
STEPS = (PLAIN, PLAIN_KEPT, PLAIN_FROZEN, CACHED, LIVE, *COMPILING, CONTIGUOUS, RETURNED, *WITHOUT, ONE_BY_ONE)
VARIANTS = {variant.name: variant for variant in STEPS}
CPU = torch.device("cpu")
PROGRAM = (sys.executable, "-m", "research.benchmarks.train_step")
GOALS = {CACHED.name: 2.1, LIVE.name: 1.45}  # times as fast as the plain step
MEMORY_GOAL = 0.7  # of the plain step's memory
POOL = 4  # batches
WARM_UP = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=[variant.name for variant in STEPS if variant not in COMPILING],
        help="besides the plain step",
    )
    add("--batch", type=int, default=16)
    add("--rounds", type=int, default=8)
    add("--steps", type=int, default=1, help="of a variant in a round")
    add("--memory", nargs="*", choices=list(VARIANTS), default=[PLAIN.name, CACHED.name, LIVE.name])
    add("--wait_steps", type=int, default=20, help="of the training with its loader; 0 = none")
    add("--alone", choices=list(VARIANTS), help=argparse.SUPPRESS)  # measure the memory of this process
    add("--asked", choices=list(VARIANTS), help=argparse.SUPPRESS)  # time steps, whenever a line is read
    return parser.parse_args(argv)


def settings_of(batch: int, folder: Path, **changes: object) -> TrainSettings:
    """Return the settings of command one, without validation and checkpoints."""
    options: dict[str, object] = {
        "output_dir": str(folder / "run"),
        "train_batch_size": batch,
        "mixed_precision": "no",
        "report_to": "none",
        "validation_steps": 0,
        "checkpointing_steps": 0,
    }
    return TrainSettings(**(options | changes))  # type: ignore[arg-type]


def batches(batch: int, settings: TrainSettings) -> list[Batch]:
    """Return batches of the embedded scenes."""
    samples = MaskedSamples(MicroScenes(count=POOL * batch), settings.mask, settings.seed)
    rows = [samples[SampleRef(index, 0)] for index in range(POOL * batch)]
    return [collate(rows[first : first + batch]) for first in range(0, len(rows), batch)]


def encoded(pool: Sequence[Batch]) -> list[Batch]:
    """Return ``pool`` with its encodings."""
    pipe = load_pipeline(BaseConfig())
    return [with_encodings(batch, pipe) for batch in pool]


def choose_allocator(variant: Variant) -> None:
    """Let this process keep the memory that it frees, as our program does and diffusers' script does not."""
    if variant is PLAIN_KEPT or not (variant.plain or variant is RETURNED):
        keep_freed_memory()


def answer_questions(variant: Variant, options: argparse.Namespace, folder: Path) -> None:
    """For each line of the standard input, make steps and print the seconds that they took."""
    settings = settings_of(options.batch, folder)
    steps = Steps(variant, settings, folder / "asked")
    steps.use(encoded(batches(options.batch, settings)))
    steps(WARM_UP)
    for _ in sys.stdin:
        print([seconds(partial(steps, options.steps), CPU)], flush=True)


def compare(options: argparse.Namespace) -> None:
    """Print the speed of every variant beside the plain step's."""
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        made = {}
        for name in dict.fromkeys([PLAIN.name, *options.variants]):
            command = [*PROGRAM, "--asked", name, "--batch", str(options.batch), "--steps", str(options.steps)]
            made[name] = stack.enter_context(closing(Apart(name, command)))
            made[name]()  # one starts after the other
        for _ in range(options.rounds):
            for name, one in made.items():
                times.setdefault(name, []).extend(one())
    print("| step | ms | times as fast as the plain step |\n|---|---|---|")
    for name, taken in times.items():
        ms = Spread.of([1e3 * took / options.steps for took in taken])
        faster, goal = ratios(times, name, PLAIN.name), GOALS.get(name)
        met = "" if goal is None else f"; goal {goal}: {'met' if faster.median >= goal else 'MISSED'}"
        print(f"| {name} | {ms.text('.0f')} | {faster.text()}{met} |", flush=True)


def load_libraries() -> None:
    """Import what a training imports on first use."""
    choose_pil_processors()
    for name in ("AutoencoderKL", "DDIMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)
    weight = nn.Parameter(torch.ones(1))
    weight.sum().backward()
    torch.optim.AdamW([weight]).step()


def alone(variant: Variant, batch: int, folder: Path) -> None:
    """Print the peak memory of this process in MiB, beyond that of the imports and the data."""
    settings = settings_of(batch, folder)
    pool = [with_random_encodings(one, read_shape(settings.base).parts) for one in batches(batch, settings)]
    load_libraries()

    def run() -> None:
        steps = Steps(variant, settings, folder / "alone")
        steps.use(pool)
        steps(4)

    print(peak_memory(run, CPU))


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of the chosen variants, each in a process of its own."""
    found: dict[str, float] = {}
    for name in dict.fromkeys([PLAIN.name, *options.memory]):
        command = [*PROGRAM, "--alone", name, "--batch", str(options.batch)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = float(done.stdout.splitlines()[-1])
        share = found[name] / found[PLAIN.name]
        met = f"; goal {MEMORY_GOAL}: {'met' if share <= MEMORY_GOAL else 'MISSED'}" if name in GOALS else ""
        print(f"memory, {name}: {found[name]:.0f} MiB, {share:.2f} times the plain step's{met}", flush=True)


def waiting(options: argparse.Namespace, folder: Path) -> None:
    """Print the share of time that the product's training waits for its data, in its first epoch."""
    steps = options.wait_steps
    settings = settings_of(options.batch, folder, max_train_steps=steps, logging_steps=steps)
    run = prepare(settings)
    run.train()
    [row] = [row for row in read_stats(run.output_dir) if "data_wait_share" in row]
    print(f"data-wait share of {steps} steps with no workers: {row['data_wait_share']:.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return 0."""
    options = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, no_progress_bars():
        folder = Path(place)
        if name := options.alone or options.asked:
            choose_allocator(VARIANTS[name])
        if options.alone:
            alone(VARIANTS[name], options.batch, folder)
        elif options.asked:
            answer_questions(VARIANTS[name], options, folder)
        if name:
            return 0
        compare(options)
        if options.memory:
            memory(options)
        if options.wait_steps:
            waiting(options, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
