"""What the GPU benchmark measures, part by part. Each part yields rows: dictionaries for a line of JSON."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from localctl.architectures import Config
from localctl.data import Batch, DataConfig
from localctl.diffusion import posterior
from localctl.messages import no_progress_bars
from localctl.pipelines import BaseConfig, encode_prompts
from localctl.training.settings import TrainSettings
from research.benchmarks.sample import CONTROLS, Runs, make_controls
from research.benchmarks.shapes import random_pipeline, shape_of
from research.benchmarks.steps import (
    CACHED,
    CHANNELS_LAST,
    CHANNELS_LAST_COMPILED,
    CHECKPOINTED,
    COMPILED,
    LIVE,
    NOT_FUSED,
    ONE_BY_ONE,
    PLAIN,
    WITHOUT,
    Steps,
    Variant,
    Work,
    random_batches,
)
from research.benchmarks.timing import GIB, MIB, Deadline, Spread, in_turns, seconds, step_figures

Row = dict[str, Any]
WARM_UP = 3  # steps of a variant before it is measured


@dataclass
class Bench:
    """The machine and the scale of a run. peak: matrix products in TFLOP/s, measured by the first part."""

    device: torch.device
    tiny: bool
    folder: Path
    deadline: Deadline
    peak: float = math.nan
    counted: dict[tuple[str, int], Work] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def pixels(self, side: int) -> int:
        """Return the side of images in pixels: ``side``, or that of tiny shapes."""
        return 64 if self.tiny else side

    def scaled(self, number: int, tiny: int) -> int:
        """Return a number of steps, rounds or images, or that of a tiny run."""
        return tiny if self.tiny else number

    def pipeline(self, base: str, whole: bool = False) -> Any:
        """Return a pipeline with random weights on the device."""
        return random_pipeline(base, self.device, self.dtype, whole=whole, tiny=self.tiny)

    def folder_of(self, base: str, whole: bool) -> Path:
        """Return the folder of a base with random weights, which is written on first use."""
        folder = self.folder / (f"{base}-whole" if whole else base)
        if not folder.exists():
            pipe = random_pipeline(base, self.device, self.dtype, whole=whole, tiny=self.tiny)
            with no_progress_bars():
                pipe.save_pretrained(folder)
        return folder

    def work(self, base: str, settings: TrainSettings, side: int) -> Work:
        """Return the FLOPs of images of this size, which are counted once."""
        if (base, side) not in self.counted:
            self.counted[base, side] = Work(base, settings, (side, side), tiny=self.tiny)
        return self.counted[base, side]

    def batches(self, batch: int, side: int, parts: Mapping[str, Config]) -> list[Batch]:
        """Return batches of noise for the base with the configs ``parts``."""
        return random_batches(self.scaled(4, 2), batch, (side, side), parts, pinned=self.device.type == "cuda")

    def free(self) -> None:
        """Return unused memory of the GPU."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def allocated(self) -> float:
        """Return the GiB in use by tensors on the GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) / GIB if self.device.type == "cuda" else 0.0

    def peak_of(self, run: Callable[[], Any]) -> float:
        """Return the peak of GiB in use while ``run`` is run, above those before; 0 on a CPU."""
        if self.device.type != "cuda":
            run()
            return 0.0
        torch.cuda.synchronize(self.device)
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / GIB - before


def limits(bench: Bench) -> Iterator[Row]:
    """Measure the rate of large matrix products in bf16, and of copies on the device."""
    side, count = bench.scaled(8192, 256), bench.scaled(20, 2)
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(bench.scaled(2**30, 2**20), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)

    def products() -> None:
        for _ in range(count):
            torch.matmul(a, b, out=product)

    def copies() -> None:
        for _ in range(count):
            target.copy_(source)

    products()
    copies()
    times = in_turns({"products": products, "copies": copies}, bench.scaled(10, 2), bench.device)
    bench.peak = count * 2 * side**3 / Spread.of(times["products"]).median / 1e12
    bandwidth = count * 2 * source.nbytes / Spread.of(times["copies"]).median / 1e9
    yield {"name": f"bf16 matrix product, {side} squared", "tflops": bench.peak}
    yield {"name": "copy on the device, bytes read and written", "gb_per_second": bandwidth}


def _settings(base: str, folder: Path, side: int, batch: int) -> TrainSettings:
    return TrainSettings(
        base=BaseConfig(name=str(folder)),
        data=DataConfig(path=str(folder), resolution=side, keep_latents=False),
        output_dir=str(folder.parent / "run"),
        max_train_steps=1_000_000,
        train_batch_size=batch,
        mixed_precision="bf16",
        logging_steps=1000,
        report_to="none",
        validation_steps=0,
        learning_rate=1e-5,
        proportion_empty_prompts=0.0,
    )


@dataclass
class Comparison:
    """A comparison of training steps on one base: size and batch, the variants, and how long to measure.

    whole: the text encoders and the VAE are real ones. steps: in a block, whose ends are synchronised.
    """

    base: str
    side: int
    batch: int
    variants: Sequence[Variant]
    whole: bool = True
    rounds: int = 5
    steps: int = 10

    def rows(self, bench: Bench) -> Iterator[Row]:
        """Build all variants, warm them up, measure them in turns, and yield a row for each."""
        side, batch = bench.pixels(self.side), bench.scaled(self.batch, 2)
        steps = bench.scaled(self.steps, 1)
        folder = bench.folder_of(self.base, self.whole)
        settings = _settings(self.base, folder, side, batch)
        work = bench.work(self.base, settings, side)
        made: dict[str, Steps] = {}
        rows: dict[str, Row] = {}
        parts = shape_of(self.base, whole=self.whole, tiny=bench.tiny)
        pool = bench.batches(batch, side, parts)
        for index, variant in enumerate(self.variants):
            bench.free()
            before = bench.allocated()
            begun = time.perf_counter()
            one = Steps(variant, settings, bench.folder / f"run-{index}")
            one.use(pool)
            first = seconds(partial(one, 1), bench.device)
            one(bench.scaled(WARM_UP, 2) - 1)
            made[variant.name] = one
            rows[variant.name] = {
                "base": self.base, "side": side, "batch": batch, "variant": variant.name,
                "compiled": any(module._compiled_call_impl for module in one.state.models.network.modules()),
                "gib": bench.allocated() - before, "first_step_seconds": first,
                "start_seconds": time.perf_counter() - begun,
            }  # fmt: skip
        runs = {name: partial(one, steps) for name, one in made.items()}
        for name, run in runs.items():
            rows[name]["gib"] += bench.peak_of(run)
        times, plain = in_turns(runs, bench.scaled(self.rounds, 1), bench.device, bench.deadline), self.variants[0].name
        for variant in self.variants:
            flops = work.of(variant)
            yield rows[variant.name] | step_figures(variant.name, plain, times, steps, batch, flops, bench.peak)
        for one in made.values():
            one.release()


@dataclass
class Controls:
    """The overhead of controls over plain sampling with guidance; compiled: of the U-Net's blocks."""

    base: str
    side: int
    batch: int
    steps: int = 10
    rounds: int = 5
    names: Sequence[str] = CONTROLS
    compiled: bool = False

    def made(self, bench: Bench) -> tuple[Any, Mapping[str, Config], Mapping[str, Any] | None]:
        """Return the pipeline, the configs of its parts, and the arguments of its guidance, if it has its own."""
        return bench.pipeline(self.base, whole=True), shape_of(self.base, whole=True, tiny=bench.tiny), None

    def rows(self, bench: Bench) -> Iterator[Row]:
        """Measure all controls in turns, and yield a row for each; peaks of memory include the models."""
        bench.free()
        side, batch = bench.pixels(self.side), bench.scaled(self.batch, 1)
        pipe, parts, call = self.made(bench)
        if self.compiled:
            pipe.unet.compile_repeated_blocks(fullgraph=True)
        controls = make_controls(self.names, pipe, self.base, side, parts)
        held = bench.allocated()
        runs = Runs(pipe, self.base, side, batch=batch, steps=bench.scaled(self.steps, 2), call=call)
        for row in runs.overheads(controls, bench.scaled(self.rounds, 1), bench.deadline):
            gib = held + row.pop("peak_mib") * MIB / GIB
            if self.compiled:
                row["control"] += ", compiled"
            yield {"base": self.base, "side": side, "batch": batch, "gib": gib, **row}


@torch.no_grad()
def encoders(bench: Bench) -> Iterator[Row]:
    """Measure the VAE's encoder and the text encoder of SD1.5 at 512 px: the speed of caching."""
    pipe, side, batch = bench.pipeline("sd15", whole=True), bench.pixels(512), bench.scaled(16, 2)
    pixels = torch.rand(batch, 3, side, side, device=bench.device)
    captions = ["a street in the rain with people and umbrellas"] * bench.scaled(64, 2)
    runs: dict[str, Callable[[], Any]] = {
        "images": lambda: posterior(pipe.vae, pixels),
        "captions": lambda: encode_prompts(pipe, captions),
    }
    for run in runs.values():
        run()
    times = in_turns(runs, bench.scaled(10, 1), bench.device, bench.deadline)
    for what, count in (("images", batch), ("captions", len(captions))):
        per_second = Spread.of([count / took for took in times[what]])
        yield {"base": "sd15", "side": side, "what": what, "batch": count, "per_second": per_second.median}


def profile_step(bench: Bench) -> Iterator[Row]:
    """Profile the cached step of SD1.5 at 512 px."""
    side, batch, steps = bench.pixels(512), bench.scaled(16, 2), bench.scaled(3, 1)
    settings = _settings("sd15", bench.folder_of("sd15", whole=True), side, batch)
    one = Steps(CACHED, settings, bench.folder / "run-profile")
    one.use(bench.batches(batch, side, shape_of("sd15", whole=True, tiny=bench.tiny)))
    one(bench.scaled(WARM_UP, 1))
    yield from profiled("cached step", partial(one, steps), steps, bench)
    one.release()


def profile_controls(bench: Bench) -> Iterator[Row]:
    """Profile sampling with SD1.5 at 512 px, without controls and with a bias."""
    pipe, side, steps = bench.pipeline("sd15", whole=True), bench.pixels(512), bench.scaled(5, 1)
    controls = make_controls(["bias"], pipe, "sd15", side, shape_of("sd15", whole=True, tiny=bench.tiny))
    runs = Runs(pipe, "sd15", side, batch=1, steps=steps)
    for name, used in controls.items():
        runs(used)
        yield from profiled(f"sampling, {name}", partial(runs, used), steps, bench)


def profiled(name: str, run: Callable[[], Any], steps: int, bench: Bench) -> Iterator[Row]:
    """Yield the time of ``steps`` steps under the profiler, and of each operation's own kernels, the longest first."""
    on_gpu = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        took = seconds(run, bench.device)
    found = profiler.key_averages()

    def own(event: Any) -> float:  # microseconds
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    # Kernels have events of their own, besides those of the operations that start them.
    events = sorted((event for event in found if event.device_type == DeviceType.CPU), key=own, reverse=True)
    busy = sum(map(own, events))
    kernels = sum(event.count for event in found if event.device_type != DeviceType.CPU) / steps
    yield {"profile": name, "ms": 1e3 * took / steps, "busy": busy / 1e6 / took, "kernels": kernels}
    for event in events[:12]:
        yield {
            "of": name, "operation": event.key, "ms": own(event) / 1e3 / steps, "share": own(event) / busy,
            "calls": event.count / steps,
        }  # fmt: skip


PARTS: Mapping[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    # name: (what yields its rows, the seconds that it takes on an H200; a part that would not end in time is left out)
    "limits": (limits, 2),
    "training": (Comparison("sd15", 512, 16, (PLAIN, CACHED, LIVE)).rows, 45),
    "controls_sd15": (Controls("sd15", 512, 1).rows, 35),
    "training_compiled": (
        Comparison("sd15", 512, 16, (PLAIN, CACHED, COMPILED), rounds=3).rows,
        100,
    ),
    "controls_compiled": (Controls("sd15", 512, 1, names=("bias", "adapter"), compiled=True).rows, 60),
    "training_sdxl": (Comparison("sdxl", 1024, 1, (CACHED,), whole=False, rounds=3, steps=5).rows, 25),
    "controls_sdxl": (Controls("sdxl", 1024, 1, steps=5, rounds=3).rows, 30),
    "training_sdxl_batch": (
        Comparison("sdxl", 1024, 4, (CACHED, CHECKPOINTED), whole=False, rounds=2, steps=3).rows,
        20,
    ),
    "encoders": (encoders, 5),
    "profile": (profile_step, 12),
    "profile_controls": (profile_controls, 12),
    "training_without": (
        Comparison("sd15", 512, 16, (CACHED, CHANNELS_LAST, *WITHOUT, NOT_FUSED, CHECKPOINTED), rounds=3).rows,
        60,
    ),
    "training_one_by_one": (Comparison("sd15", 512, 16, (LIVE, ONE_BY_ONE), rounds=3).rows, 20),
    "training_batch_8": (Comparison("sd15", 512, 8, (CACHED,), rounds=3).rows, 10),
    "training_batch_32": (Comparison("sd15", 512, 32, (CACHED,), rounds=3).rows, 15),
    "controls_sd15_batch": (Controls("sd15", 512, 4, rounds=3).rows, 30),
    "training_compiled_formats": (
        Comparison("sd15", 512, 16, (COMPILED, CHANNELS_LAST_COMPILED), rounds=3).rows,
        150,
    ),
    "controls_sdxl_batch": (Controls("sdxl", 1024, 4, steps=5, rounds=2).rows, 60),
}
