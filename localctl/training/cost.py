"""Estimate the memory and FLOPs of a run for `train_adapter.py --dry_run`, and suggest settings that need less. A step
with the real shapes runs on the meta device, without weights.

A multiplication with its addition counts as 2 FLOPs; only matrix products and convolutions are counted. Backward
computes the gradients of activations in the frozen U-Net, from the first block that the adapter reaches, and none of
its weights. Attention is fused and does not store its scores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from localctl.adapter import LocalAdapter
from localctl.architectures import TABLE, BaseShape, read_shape
from localctl.denoisers import bare_denoiser
from localctl.denoisers.base import Denoiser
from localctl.diffusion import is_for_videos, latent_channels, latent_size
from localctl.pipelines import DTYPES, BaseConfig
from localctl.training.adapter_plan import plan_adapter
from localctl.training.frozen import dtype_of
from localctl.training.large_bases import BYTES
from localctl.training.operations import count_operations
from localctl.training.settings import AdapterConfig, TrainSettings

SIZES = {  # the image sides at which these bases were trained
    **{"sd15": 512, "sd21": 768, "sdxl": 1024},
    **dict.fromkeys(("pixart", "sd3", "flux", "flux2", "qwen_image", "z_image"), 1024),
}
GIB = 2**30
_HALF = ("fp16", "bf16")
_HEAD = (
    "base", "size", "batch", "precision", "trained M", "frozen M", "step TFLOP", "vae TFLOP",
    "weights", "gradients", "optimizer", "activations", "GiB in all",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of one sample.

    flops: of the training step without the VAE's encoder; vae_flops: of the encoder. activations, vae_bytes: the peak
    of bytes in use in either, beside weights and their gradients; of the encoder in float32.
    """

    flops: float
    vae_flops: float
    activations: int
    vae_bytes: int


@dataclass(frozen=True)
class Estimate:
    """An estimate. trained, frozen: numbers of parameters. flops, vae_flops: per sample. The others: bytes."""

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
        """Return the bytes needed on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


class Estimator:
    """Estimates the cost of settings for one shape of base and adapter; the counts of each image size are cached."""

    def __init__(self, settings: TrainSettings, shape: BaseShape) -> None:
        self.shape, self.options = shape, plan_adapter(settings, shape).options
        self._count = cache(partial(count_step, shape, self.options))
        with torch.device("meta"):
            self.trained = sum(p.numel() for p in LocalAdapter(**self.options).parameters())
        denoiser: Any = bare_denoiser(shape.build(shape.denoiser))
        blocks = [sum(p.numel() for p in block.parameters()) for _, block in getattr(denoiser, "blocks", ())]
        self.frozen = {part: sum(p.numel() for p in shape.build(part).parameters()) for part in shape.parts}
        # Of the denoiser's weights, the share that is on the device at once when they are offloaded.
        self.resident = 1 - (sum(blocks) - max(blocks)) / self.frozen[shape.denoiser] if blocks else 1.0

    def cost(self, settings: TrainSettings, size: tuple[int, int]) -> Cost:
        """Return the cost of one sample of ``size`` (height, width) with ``settings``."""
        dtype = dtype_of(settings, settings.precision)
        return self._count(size, settings.gradient_checkpointing, dtype, settings.max_sequence_length)

    def estimate(self, settings: TrainSettings, size: tuple[int, int]) -> Estimate:
        """Estimate training with ``settings`` at ``size`` (height, width); activations are proportional to the batch
        size."""
        cost, half = self.cost(settings, size), settings.precision in _HALF
        width = dtype_of(settings, settings.precision).itemsize
        vae_width = 4 if self.shape.xl else width
        encodes = settings.data.encodings_dir is None
        denoiser = self.shape.denoiser
        loaded = self.frozen if encodes or settings.generates_images else {denoiser: self.frozen[denoiser]}
        widths = dict.fromkeys(loaded, float(width)) | {"vae": vae_width}
        if settings.quantization is not None:
            widths[denoiser] = BYTES[settings.quantization]
        frozen = int(sum(count * widths[part] for part, count in loaded.items()))
        if settings.offload_base:  # a block at a time, and the few weights outside of the blocks
            frozen -= int(self.frozen[denoiser] * widths[denoiser] * (1 - self.resident))
        conditions = bool(self.options.get("latent_channels"))  # which the VAE encodes, too
        alive = max(cost.activations, cost.vae_bytes * vae_width * (encodes or conditions) // 4)
        return Estimate(
            trained=self.trained,
            frozen=sum(loaded.values()),
            flops=cost.flops,
            vae_flops=cost.vae_flops * (encodes + conditions),
            weights=frozen + self.trained * ((8 if settings.use_ema else 4) + 2 * half),  # and autocast's copies
            gradients=self.trained * 4,
            optimizer=self.trained * (2 if settings.use_8bit_adam else 8),  # both moments
            activations=settings.train_batch_size * alive,
        )


def report(settings: TrainSettings) -> str:
    """Return a table of costs, the present settings first, and what reduces them; no weights are read.

    Raises:
        ValueError: base, adapter and settings do not fit.
    """
    base, size = settings.base.name, settings.data.largest_size
    estimator = Estimator(settings, read_shape(settings.base))
    multiple = estimator.options["downscale_factor"]
    if any(side % multiple for side in size):
        raise ValueError(f"The adapter needs sizes in multiples of {multiple} pixels, not {size}.")
    now = estimator.estimate(settings, size)
    rows = [_HEAD, _row(f"these settings: {base}", settings, size, now), *_known_bases(settings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    part = "U-Net" if estimator.shape.denoiser == "unet" else "transformer"
    text = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows] + [""]
    if estimator.shape.from_table:
        text.append(f"None of the files of {base} are here yet; its well-known shape is counted.")
    if settings.loss.filter == "edges":
        text.append("Decoding by loss=edges, of the images with little noise, is not counted.")
    per_update = settings.gradient_accumulation_steps * settings.train_batch_size
    text += [
        f"An update of these settings takes {per_update} samples per process: "
        f"{per_update * (now.flops + now.vae_flops) / 1e12:.2f} TFLOP.",
        f"A product with its addition counts as 2 FLOP; `step` is forward and backward of {part} and adapter, where",
        f"the frozen {part} pays for no gradients of weights; `vae` is its encoder, once per image if latents are",
        "kept, and 0 with data.encodings_dir.",
        "Memory is weights, gradients, optimizer and activations with fused attention; the device's own needs (a",
        "context, work space of kernels, fragments: often 1 to 2 GiB) and generating validation images come on top.",
        "",
        *_ways_out(estimator, settings, size),
    ]
    return "\n".join(text)


def _known_bases(settings: TrainSettings) -> Iterator[tuple[str, ...]]:
    """Yield rows of the table: well-known bases at the size at which they were trained."""
    plain = {"adapter": AdapterConfig(), "adapter_model_name_or_path": None, "gradient_checkpointing": False}
    plain |= {"use_8bit_adam": False, "use_ema": False, "flow_shift": None, "distilled_guidance": None}
    plain |= {"quantization": None, "offload_base": False, "max_sequence_length": None}
    kind = read_shape(settings.base).denoiser
    for name, side in SIZES.items():
        if kind not in TABLE[name]:
            continue
        other = replace(settings, base=BaseConfig(name=name), **plain)  # type: ignore[arg-type]
        estimator = Estimator(other, BaseShape(TABLE[name], from_table=True))
        for precision in ("no", "bf16"):
            for batch in (1, 4):
                known = replace(other, mixed_precision=precision, train_batch_size=batch)
                yield _row(name, known, (side, side), estimator.estimate(known, (side, side)))


def _row(name: str, settings: TrainSettings, size: tuple[int, int], estimate: Estimate) -> tuple[str, ...]:
    shown = f"{size[1]}x{size[0]}", str(settings.train_batch_size), settings.precision
    numbers = [f"{count / 1e6:.1f}" for count in (estimate.trained, estimate.frozen)]
    numbers += [f"{flops / 1e12:.3f}" for flops in (estimate.flops, estimate.vae_flops)]
    memory = estimate.weights, estimate.gradients, estimate.optimizer, estimate.activations, estimate.total
    return (name, *shown, *numbers, *(f"{part / GIB:.2f}" for part in memory))


def _ways_out(estimator: Estimator, settings: TrainSettings, size: tuple[int, int]) -> list[str]:
    """Return flags with the memory that each would need, and all of them together."""
    steps = settings.gradient_accumulation_steps * settings.train_batch_size
    transformer = estimator.shape.denoiser == "transformer"
    ways = [replace(settings, gradient_checkpointing=on, offload_base=False) for on in (False, True)]
    plain, more = (estimator.cost(way, size).flops for way in ways)
    half = settings.precision in _HALF or DTYPES[settings.base.dtype] != torch.float32
    offers: list[tuple[bool, str, dict[str, Any], str]] = [
        (not half, "--mixed_precision bf16", {"mixed_precision": "bf16"}, "fp16 on cards without bf16"),
        (
            not settings.gradient_checkpointing, "--gradient_checkpointing", {"gradient_checkpointing": True},
            f"{more / plain - 1:.0%} more FLOP",
        ),
        (
            transformer and settings.quantization is None, "--quantization bitsandbytes_4bit --mixed_precision bf16",
            {"quantization": "bitsandbytes_4bit", "mixed_precision": "bf16"}, "needs bitsandbytes",
        ),
        (
            transformer and not settings.offload_base, "--offload_base --gradient_checkpointing",
            {"offload_base": True, "gradient_checkpointing": True}, "slower: weights are copied in each step",
        ),
        (
            settings.train_batch_size > 1, f"--train_batch_size 1 --gradient_accumulation_steps {steps}",
            {"train_batch_size": 1}, "the same update",
        ),
        (not settings.use_8bit_adam, "--use_8bit_adam", {"use_8bit_adam": True}, "needs bitsandbytes"),
        (settings.use_ema, "use_ema=false", {"use_ema": False}, ""),
    ]  # fmt: skip

    def line(flags: str, changes: dict[str, Any], note: str = "") -> str:
        total = estimator.estimate(replace(settings, **changes), size).total
        return f"  {flags:<66} {total / GIB:6.1f} GiB" + (f"  ({note})" if note else "")

    everything: dict[str, Any] = {}
    for wanted, _, changes, _ in offers:
        everything |= changes if wanted else {}
    return [
        f"If {estimator.estimate(settings, size).total / GIB:.1f} GiB do not fit:",
        *(line(flags, changes, note) for wanted, flags, changes, note in offers if wanted),
        line("all of these", everything),
        "Then smaller images (data.resolution), or a smaller base.",
    ]


def count_step(
    shape: BaseShape,
    options: dict[str, Any],
    size: tuple[int, int],
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
) -> Cost:
    """Count the cost of one sample of ``size`` (height, width) in pixels.

    options: of ``LocalAdapter``. dtype: in which denoiser and adapter compute; what they keep in float32 all the same,
    as transformers do in norms and rotations, is counted as such. tokens: ``max_sequence_length``.
    """
    network: Any = shape.build(shape.denoiser)
    vae: Any = shape.build("vae")  # now, as its weights are not counted
    if dtype != torch.float32:
        network = nn.Module.to(copy.deepcopy(network), dtype)  # diffusers' own .to() warns
    network.enable_gradient_checkpointing() if checkpointing else network.disable_gradient_checkpointing()
    with torch.device("meta"):
        adapter = LocalAdapter(**options)
    nn.Module.to(adapter, dtype)
    for parameter in adapter.parameters():  # the caller counts the gradients of weights
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    denoiser = bare_denoiser(network)
    denoiser.text_length = tokens
    flops, activations = count_operations(lambda: _step(denoiser, adapter, shape, size))
    vae_flops, vae_bytes = count_operations(lambda: _encode(vae, size))
    return Cost(flops, vae_flops, activations, vae_bytes)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _step(denoiser: Denoiser, adapter: LocalAdapter, shape: BaseShape, size: tuple[int, int]) -> None:
    dtype = adapter.dtype
    texts, channels = denoiser.blank_texts().to("meta", dtype), latent_channels(shape.build("vae"))
    noisy = torch.empty(1, channels, *latent_size(*size, shape.vae_scale_factor), device="meta", dtype=dtype)
    condition = torch.empty(1, adapter.channels_of_condition, *size, device="meta", dtype=dtype)
    features = adapter(adapter.inputs(condition, condition[:, :1], lambda pixels: torch.empty_like(noisy)))
    step = torch.empty(1, device="meta", dtype=torch.float32 if denoiser.by_flow else torch.long)
    output = denoiser.output(noisy, step, denoiser.conditioning(texts, size, [None]), features)
    output.float().square().mean().backward()


@torch.no_grad()
def _encode(vae: Any, size: tuple[int, int]) -> None:
    pixels = torch.empty(1, 3, *size, device="meta")
    vae.encode(pixels.unsqueeze(2) if is_for_videos(vae) else pixels)
