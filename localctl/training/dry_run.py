"""`train_adapter.py --dry_run`: what a run would cost, from shapes alone, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from localctl.adapter import LocalAdapter
from localctl.architectures import TABLE, BaseShape, read_shape
from localctl.pipelines import DTYPES, BaseConfig
from localctl.training.adapters import plan_adapter
from localctl.training.memory import Cost, count_step
from localctl.training.settings import AdapterConfig, TrainSettings

SIZES = {"sd15": 512, "sd21": 768, "sdxl": 1024}  # what these bases were trained at
BATCHES = (1, 4)
PRECISIONS = ("no", "bf16")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What the cost of a step depends on. precision: of ``mixed_precision``; dtype: of the frozen parts with it."""

    base: str
    size: tuple[int, int]
    batch: int
    precision: str
    dtype: torch.dtype
    checkpointing: bool = False
    adam_bytes: int = 8  # of both moments, per trained weight
    ema: bool = False


@dataclass(frozen=True)
class Estimate:
    """trained, frozen: parameters. flops, vae_flops: per sample. The rest: bytes."""

    trained: int
    frozen: int
    flops: float
    vae_flops: float
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


class Estimator:
    """Estimates plans for one shape of base and adapter; each shape is counted once."""

    def __init__(self, settings: TrainSettings, shape: BaseShape) -> None:
        self.shape = shape
        options = plan_adapter(settings, shape).options
        self.cost = cache(lambda size, checkpointing: count_step(shape, options, size, torch.float32, checkpointing))
        with torch.device("meta"):
            self.trained = sum(p.numel() for p in LocalAdapter(**options).parameters())
        self.frozen = {part: sum(p.numel() for p in shape.build(part).parameters()) for part in shape.parts}

    def estimate(self, plan: Plan) -> Estimate:
        """The estimate of ``plan``; activations grow with the batch and with the bytes of the dtype."""
        cost: Cost = self.cost(plan.size, plan.checkpointing)
        width = plan.dtype.itemsize
        vae_width = 4 if self.shape.xl else width
        frozen = sum(count * (vae_width if part == "vae" else width) for part, count in self.frozen.items())
        alive = max(cost.activations * width, cost.vae_bytes * vae_width) // 4
        return Estimate(
            trained=self.trained,
            frozen=sum(self.frozen.values()),
            flops=cost.flops,
            vae_flops=cost.vae_flops,
            weights=frozen + self.trained * (8 if plan.ema else 4),
            gradients=self.trained * 4,
            optimizer=self.trained * plan.adam_bytes,
            activations=plan.batch * alive,
        )


def present_plan(settings: TrainSettings) -> Plan:
    """The plan that ``settings`` are; a precision that they leave open is what `accelerate launch` would say."""
    precision = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return Plan(
        base=settings.base.name,
        size=settings.data.size,
        batch=settings.train_batch_size,
        precision=precision,
        dtype=HALF.get(precision, DTYPES[settings.base.dtype]),
        checkpointing=settings.gradient_checkpointing,
        adam_bytes=2 if settings.use_8bit_adam else 8,
        ema=settings.use_ema,
    )


def report(settings: TrainSettings) -> str:
    """The table, the present settings first, and what helps if they do not fit. ValueError where base, adapter and
    settings do not go together. No weights are read."""
    plan = present_plan(settings)
    estimator = Estimator(settings, read_shape(settings.base))
    multiple = plan_adapter(settings, estimator.shape).options["downscale_factor"]
    if any(side % multiple for side in plan.size):
        raise ValueError(f"The adapter needs sizes in multiples of {multiple} pixels, not {plan.size}.")
    now = estimator.estimate(plan)
    rows = [_row("these settings: " + plan.base, plan, now)]
    for name, side in SIZES.items():
        other = replace(settings, base=BaseConfig(name=name), adapter=AdapterConfig(), adapter_model_name_or_path=None)
        estimators = Estimator(other, BaseShape(TABLE[name], from_table=True))
        for precision in PRECISIONS:
            for batch in BATCHES:
                known = Plan(name, (side, side), batch, precision, HALF.get(precision, torch.float32))
                rows.append(_row(name, known, estimators.estimate(known)))
    per_update = settings.gradient_accumulation_steps * plan.batch
    text = [_table(rows), ""]
    if estimator.shape.from_table:
        text.append(f"None of the files of {plan.base} are here yet; its well-known shape is counted.")
    text += [
        f"An update of these settings takes {per_update} samples per process: "
        f"{per_update * (now.flops + now.vae_flops) / 1e12:.2f} TFLOP.",
        "A product with its addition counts as 2 FLOP; `step` is forward and backward of U-Net and adapter, where the",
        "frozen U-Net pays for no gradients of weights; `vae` is its encoder, once per picture if latents are kept.",
        "Memory is weights, gradients, optimizer and activations with fused attention; the device's own needs (a",
        "context, work space of kernels, fragments: often 1 to 2 GiB) and drawing validation pictures come on top.",
        "",
        *_ways_out(estimator, plan, settings, now),
    ]
    return "\n".join(text)


def _ways_out(estimator: Estimator, plan: Plan, settings: TrainSettings, now: Estimate) -> list[str]:
    """Concrete flags with what each would leave, alone and all together."""
    lines = [f"If {now.total / GIB:.1f} GiB do not fit:"]
    smallest = plan

    def offer(flags: str, changes: dict[str, object], note: str = "") -> None:
        nonlocal smallest
        total = estimator.estimate(replace(plan, **changes)).total  # type: ignore[arg-type]
        smallest = replace(smallest, **changes)  # type: ignore[arg-type]
        lines.append(f"  {flags:<66} {total / GIB:6.1f} GiB{note}")

    if plan.dtype == torch.float32:
        offer("--mixed_precision bf16", {"dtype": torch.bfloat16}, "  (fp16 on cards without bf16)")
    if not plan.checkpointing:
        cost, more = estimator.cost(plan.size, False), estimator.cost(plan.size, True)
        offer("--gradient_checkpointing", {"checkpointing": True}, f"  ({more.flops / cost.flops - 1:.0%} more FLOP)")
    if plan.batch > 1:
        steps = settings.gradient_accumulation_steps * plan.batch
        flags = f"--train_batch_size 1 --gradient_accumulation_steps {steps}"
        offer(flags, {"batch": 1}, "  (the same update)")
    if plan.adam_bytes > 2:
        offer("--use_8bit_adam", {"adam_bytes": 2}, "  (needs bitsandbytes)")
    if plan.ema:
        offer("use_ema=false", {"ema": False})
    lines.append(f"  {'all of these':<66} {estimator.estimate(smallest).total / GIB:6.1f} GiB")
    lines.append("Then smaller pictures (data.resolution), or a smaller base.")
    return lines


_HEAD = (
    "base", "size", "batch", "precision", "trained M", "frozen M", "step TFLOP", "vae TFLOP",
    "weights", "gradients", "optimizer", "activations", "GiB in all",
)  # fmt: skip


def _row(name: str, plan: Plan, estimate: Estimate) -> tuple[str, ...]:
    parts = asdict(estimate)
    size = "x".join(str(side) for side in reversed(plan.size))
    flops = [f"{parts[key] / 1e12:.3f}" for key in ("flops", "vae_flops")]
    memory = [f"{parts[key] / GIB:.2f}" for key in ("weights", "gradients", "optimizer", "activations")]
    numbers = [f"{parts[key] / 1e6:.1f}" for key in ("trained", "frozen")]
    return (name, size, str(plan.batch), plan.precision, *numbers, *flops, *memory, f"{estimate.total / GIB:.2f}")


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [_HEAD, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)
