"""The parts of a training run: the frozen base, the adapter, and what is remembered of the frozen parts' answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from localctl.adapter import LocalAdapter
from localctl.base import lasting_name, load_pipeline
from localctl.control.local_adapter import residual_shapes
from localctl.data.sample import Batch
from localctl.diffusion import check_schedule, latent_size
from localctl.random import key_seed
from localctl.training.settings import TrainSettings

MEMO_BYTES = 512 * 2**20


class Memo:
    """Remembers results of a pure function from text to tensor, the most recently used up to ``max_bytes``.

    Each is computed alone, never in a batch: so it cannot depend on which others were missing at the time, and a run
    that starts with nothing remembered, after a resume, gets the very same bits.
    """

    def __init__(self, max_bytes: int = MEMO_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor for ``key``, computed on the first call."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._kept[key] = compute()
        self._bytes += value.nbytes
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return value


class Models:
    """A frozen base with an adapter on it.

    adapter: what the training step calls; with several processes a wrapper around ``plain_adapter``.
    alphas_cumprod (T,), prediction_type, num_train_timesteps: of the base's own scheduler, kept here because validation
        gives the pipeline another one.
    """

    def __init__(self, pipe: DiffusionPipeline, adapter: LocalAdapter, keep_latents: bool = True) -> None:
        self.pipe = pipe
        self.plain_adapter = adapter
        self.adapter: Callable[[Tensor], list[Tensor]] = adapter
        self.unet, self.vae = pipe.unet, pipe.vae
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod.float().to(self.device)
        self.num_train_timesteps = len(self.alphas_cumprod)
        self.prediction_type = pipe.scheduler.config.prediction_type
        check_schedule(self.alphas_cumprod, self.prediction_type)
        self._texts = Memo()
        self._moments = Memo() if keep_latents else None

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts."""
        return self.unet.dtype

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The parts that must not change, by name."""
        parts = self.pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of pictures of this size."""
        return (self.vae.config.latent_channels, *latent_size(height, width, self.pipe.vae_scale_factor))

    def encode(self, batch: Batch, posterior_noise: Tensor) -> Tensor:
        """The scaled latents z0 (B,c,h,w) float32 of the batch's pixels, sampled with ``posterior_noise``."""
        kept = self._moments
        if kept is None:
            moments = self._encode_moments(batch.pixels)
        else:
            # key and view: a crop is another picture
            names = [f"{key}\0{view}" for key, view in zip(batch.keys, batch.views or [""] * len(batch), strict=True)]
            pictures = zip(names, batch.pixels, strict=True)
            moments = torch.cat([kept.get(name, partial(self._encode_moments, p[None])) for name, p in pictures])
        mean, std = moments.chunk(2, dim=1)  # (B,c,h,w) each
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (mean + std * posterior_noise - shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def _encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation (B,2c,h,w) float32 of the VAE's posterior."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def text_states(self, captions: list[str]) -> Tensor:
        """What the U-Net reads: (B, tokens, width), as the pipeline itself encodes prompts."""
        return torch.cat([self._texts.get(caption, partial(self._encode_text, caption)) for caption in captions])

    @torch.no_grad()
    def _encode_text(self, caption: str) -> Tensor:
        return self.pipe.encode_prompt(caption, self.device, 1, do_classifier_free_guidance=False)[0]


def load_models(settings: TrainSettings, device: torch.device, dtype: torch.dtype | None) -> Models:
    """Load the base, frozen, and a new adapter for it, float32 and trainable; its weights depend on the seed alone.

    ``dtype`` of the frozen parts; None = as the base's config says. ValueError when base and adapter do not fit.
    """
    with _no_progress_bars():
        pipe = load_pipeline(settings.base, dtype=dtype, device=device)
    if type(pipe).__name__ != "StableDiffusionPipeline":  # importing the class would load it before its processors
        raise ValueError(f"The base {settings.base.name!r} is a {type(pipe).__name__}; training takes SD 1.x and 2.x.")
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cpu":
        pipe.unet.to(memory_format=torch.channels_last)  # what CPU convolutions prefer
        pipe.vae.to(memory_format=torch.channels_last)
    adapter = new_adapter(settings, pipe).to(device)
    return Models(pipe, adapter.train(), keep_latents=settings.data.latents_may_be_kept)


def new_adapter(settings: TrainSettings, pipe: DiffusionPipeline) -> LocalAdapter:
    """An adapter that fits the U-Net of ``pipe``, with fresh weights; the global random state is left alone."""
    options = asdict(settings.adapter)
    channels = options.pop("channels") or pipe.unet.config.block_out_channels
    options |= {"in_channels": settings.condition.channels, "channels": list(channels)}
    _check_fit(options, pipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(settings.seed, "adapter"))
        return LocalAdapter(condition=asdict(settings.condition), base=lasting_name(settings.base.name), **options)


def _check_fit(options: dict[str, Any], pipe: DiffusionPipeline) -> None:
    """ValueError unless an adapter of these options makes what the U-Net takes; nothing is computed."""
    side = 64 * pipe.vae_scale_factor
    with torch.device("meta"):
        features = LocalAdapter(**options)(torch.zeros(1, options["in_channels"] + 1, side, side))
    made = [tuple(feature.shape[1:]) for feature in features]
    taken = residual_shapes(pipe.unet, latent_size(side, side, pipe.vae_scale_factor))[: len(made)]
    if made != taken:
        raise ValueError(
            f"For {side}x{side} pixels the adapter would make features {made} but the base's U-Net takes {taken}; "
            "leave adapter.channels and adapter.downscale_factor at their defaults."
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the libraries' own bars, one per file they read, which would bury the run's first lines."""
    libraries: list[tuple[Any, bool]] = [
        (library, library.is_progress_bar_enabled()) for library in (diffusers_logging, transformers_logging)
    ]
    for library, _ in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, enabled in libraries:
            if enabled:
                library.enable_progress_bar()
