"""Estimate the disk and the time of ``localctl cache`` for ``--dry_run``: bytes and FLOPs from shapes alone, rates
measured on this machine in a second or two."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from localctl.architectures import TEXT_PARTS, BaseShape, read_shape
from localctl.caching.cache import check_place
from localctl.caching.settings import CacheSettings
from localctl.cluster import available_cpus
from localctl.data.bad_rows import BadRow
from localctl.data.files import FileSource
from localctl.data.plan import SampleRef
from localctl.data.sample import Source
from localctl.denoisers import bare_denoiser
from localctl.denoisers.unet import TOKENS
from localctl.diffusion import is_for_videos, latent_channels, latent_size
from localctl.encodings.captions import each_caption
from localctl.encodings.codec import pack
from localctl.encodings.source import caption_id, visited
from localctl.training.data import make_source
from localctl.training.encoded import recipes_of
from localctl.training.frozen import dtype_of
from localctl.training.operations import count_flops

SHARE = 0.4  # of the rate of a large matrix product that an encoder is assumed to reach
_EXAMPLES = 4  # read to measure how long one takes


@dataclass(frozen=True)
class Expense:
    """Of one kind of encodings. size: bytes of a row. seconds: of a row, on one worker."""

    kind: str
    rows: int
    size: float
    seconds: float

    @property
    def bytes(self) -> float:
        """Bytes of all rows."""
        return self.rows * self.size


def report(settings: CacheSettings) -> str:
    """Return the estimate as text. ValueError if data, base or settings cannot be used."""
    root = check_place(settings)
    settings = replace(settings, data=replace(settings.data, encodings_dir=None))
    source, shape = make_source(settings, "train"), read_shape(settings.base)
    dtype = dtype_of(settings, settings.precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = measured_rate(device, dtype)
    workers = settings.num_workers or (torch.cuda.device_count() or available_cpus())
    reading, stored = _reading(settings, source)
    expenses = _expenses(settings, source, shape, SHARE * rate, reading, stored)
    seconds = sum(item.rows * item.seconds for item in expenses) / workers
    total = sum(item.bytes for item in expenses)
    free = shutil.disk_usage(next(place for place in (root, *root.resolve().parents) if place.exists())).free
    lines = [
        f"{item.kind:<11} {item.rows:>9,} rows x {item.size / 1e3:8.1f} kB = {item.bytes / 1e9:8.3f} GB"
        for item in expenses
    ]
    lines += [
        f"disk        {total / 1e9:.3f} GB, and as much again until the run has ended; {free / 1e9:.1f} GB are free",
        f"time        about {_duration(seconds)} with {workers} workers, and half a minute to start",
        f"            encoders at {SHARE:.0%} of the {rate / 1e12:.2f} TFLOP/s of a matrix product on {device}, and "
        f"{reading * 1e3:.1f} ms to read an image, both measured here",
    ]
    if 2 * total > free:
        lines.append("            That is more than is free: choose another --encodings_dir.")
    return "\n".join(lines)


def _expenses(
    settings: CacheSettings, source: Source, shape: BaseShape, rate: float, reading: float, stored: float
) -> list[Expense]:
    height, width = settings.data.size
    half = dtype_of(settings, settings.precision).itemsize
    vae: Any = shape.build("vae")
    moments = 2 * latent_channels(vae) * _area(latent_size(height, width, shape.vae_scale_factor)) * half
    images = len(source) * (settings.num_variants if recipes_of(settings).varies else 1)
    pixels = torch.empty(1, 3, height, width, device="meta")
    vae_flops = count_flops(partial(vae.encode, pixels.unsqueeze(2) if is_for_videos(vae) else pixels))
    text_flops, text_bytes = _of_text(shape)
    many = _captions(settings, source)
    found = [Expense("images", images, moments, vae_flops / rate + reading)]
    if settings.cache_conditions:
        found.append(Expense("conditions", images, stored, reading))
    return [*found, Expense("captions", many, text_bytes * half, text_flops / rate)]


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _of_text(shape: BaseShape) -> tuple[float, int]:
    """Return FLOPs and number of values of the embeddings of a caption."""
    texts = bare_denoiser(shape.build(shape.denoiser)).blank_texts()
    flops = 0.0
    for name in TEXT_PARTS:
        if name in shape.parts:
            encoder: Any = shape.build(name)
            clip = type(encoder).__name__.startswith("CLIP")
            tokens = torch.zeros(1, TOKENS if clip else texts.states.shape[1], dtype=torch.long, device="meta")
            flops += count_flops(lambda encoder=encoder, tokens=tokens: encoder(tokens))
    return flops, texts.states.numel() + (0 if texts.pooled is None else texts.pooled.numel())


def _captions(settings: CacheSettings, source: Source) -> int:
    """Return how many distinct captions there are at most."""
    if not isinstance(source, FileSource):
        return len(source) + 1
    if source.rows.captions() is None:
        return len(source) * settings.num_variants + 1
    distinct: set[bytes] = set()
    met = 0
    for _, captions in each_caption(source):
        distinct.update(map(caption_id, captions))
        met += min(len(captions), settings.num_variants)
    return min(len(distinct), met) + 1


def _reading(settings: CacheSettings, source: Source) -> tuple[float, float]:
    """Return the seconds to read an example, and the bytes of its condition and mask as they are stored."""
    seconds, sizes = [], []
    for index in range(min(_EXAMPLES, len(source))):
        started = time.perf_counter()
        try:
            example = visited(source, SampleRef(index, 0), settings.seed)
        except BadRow:
            continue
        seconds.append(time.perf_counter() - started)
        sizes.append(len(pack({"condition": example.condition, "mask": example.mask}, squeeze=True)[1]))
    return (sum(seconds) / len(seconds), sum(sizes) / len(sizes)) if seconds else (0.0, 0.0)


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, the best of three."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / min(_seconds(lambda: matrix @ matrix, device) for _ in range(4))


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
