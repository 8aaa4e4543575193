"""The models of a training run: the frozen base, with cached encodings, and the adapter to train."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from localctl.adapter import LocalAdapter
from localctl.data.sample import Batch
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import Conditioning
from localctl.devices import send
from localctl.diffusion import (
    FLOW,
    check_schedule,
    encode,
    flow_shift,
    flow_sigmas,
    latent_channels,
    latent_size,
    posterior,
    scale_latents,
)
from localctl.prompt_embeds import PromptEmbeds
from localctl.sampling_settings import Sampling
from localctl.training.adapter_plan import plan_adapter
from localctl.training.frozen import load_frozen
from localctl.training.halves import in_halves
from localctl.training.memo import MEMO_BYTES, Memo
from localctl.training.settings import TrainSettings

_PIXELS_AT_ONCE = 8 * 128 * 128  # that a CPU encodes: its caches hold no more activations


class Models:
    """A frozen base with an adapter on it.

    adapter: what the training step calls; with several processes a wrapper around ``plain_adapter``.
    network: the frozen U-Net or transformer, which ``denoiser`` knows how to call.
    prediction_type, num_train_timesteps: of the base's own scheduler.
    flow_shift: of the noise levels of flow matching; None = that of the scheduler for each size.
    """

    def __init__(self, pipe: DiffusionPipeline, adapter: LocalAdapter, flow_shift: float | None = None) -> None:
        self.pipe = pipe
        self.plain_adapter = adapter
        self.adapter: Callable[[Tensor], list[Tensor]] = adapter
        self.denoiser = denoiser_of(pipe)
        self.network: Any = self.denoiser.module
        self.vae = pipe.vae
        self.prediction_type = self.denoiser.prediction_type
        self._scheduler, self._flow_shift = pipe.scheduler, flow_shift  # validation replaces the pipeline's
        self.num_train_timesteps = int(pipe.scheduler.config.num_train_timesteps)
        self._tables: dict[tuple[tuple[int, int], bool], Tensor] = {}
        if self.prediction_type != FLOW:
            check_schedule(pipe.scheduler.alphas_cumprod, self.prediction_type)
        self._empty_text: PromptEmbeds | None = None
        self._texts: Memo[PromptEmbeds] | None = None
        self._moments: Memo[Tensor] | None = None

    @cached_property
    def device(self) -> torch.device:
        """Of the frozen parts, which stay where they are loaded: diffusers looks through all modules each time."""
        return self.network.device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts."""
        return self.network.dtype

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """Return the frozen parts by name."""
        parts = self.pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) of the latents for images of this size in pixels."""
        return (latent_channels(self.vae), *latent_size(height, width, self.pipe.vae_scale_factor))

    def noise_table(self, size: tuple[int, int], *, on_host: bool = False) -> Tensor:
        """Return alphas_cumprod (T,), or sigma of flow matching at each timestep, for images of ``size`` (height,
        width)."""
        if (size, on_host) not in self._tables:
            if self.prediction_type == FLOW:
                shapes = self.denoiser.residual_shapes(self.latent_shape(*size)[1:])
                shift = self._flow_shift or flow_shift(self._scheduler, math.prod(shapes[0][1:]))
                table = flow_sigmas(self.num_train_timesteps, shift)
            else:
                table = self._scheduler.alphas_cumprod.float()
            self._tables[size, on_host] = table if on_host else send(table, self.device)
        return self._tables[size, on_host]

    def keep_encodings(self, samples: int, size: tuple[int, int], *, images: bool) -> None:
        """Keep encodings in memory from now on: captions if those of ``samples`` fit in ``MEMO_BYTES``, and, with
        ``images``, images of ``size`` (height, width) if those do."""
        moments = 2 * torch.float32.itemsize * math.prod(self.latent_shape(*size))
        self._texts = Memo() if samples * self.empty_text.nbytes <= MEMO_BYTES else None
        self._moments = Memo() if images and samples * moments <= MEMO_BYTES else None

    @property
    def kept(self) -> tuple[str, ...]:
        """What is encoded once and kept in memory: "images", "captions"."""
        return tuple(name for name, memo in (("images", self._moments), ("captions", self._texts)) if memo is not None)

    def encode(self, batch: Batch, posterior_noise: Tensor) -> Tensor:
        """Encode the batch's pixels to scaled latents z0 (B,c,h,w) float32, sampled with ``posterior_noise``. Moments
        that come with the batch are used as they are."""
        if batch.moments is not None:
            moments = batch.moments.float()
        elif self._moments is None:
            moments = self._encode_moments(send(batch.pixels, self.device))
        else:
            # key and view: a crop is another image
            names = [f"{key}\0{view}" for key, view in zip(batch.keys, batch.views or [""] * len(batch), strict=True)]
            kept = self._moments.get(names, lambda places: self._encode_places(batch.pixels, places), len(batch))
            moments = torch.cat([kept[name] for name in names])
        mean, std = moments.chunk(2, dim=1)  # (B,c,h,w) each
        return scale_latents(self.vae, mean + std * posterior_noise)

    def _encode_places(self, pixels: Tensor, places: list[int]) -> Tensor:
        """Return :meth:`_encode_moments` of ``pixels`` (B,3,H,W) at ``places``."""
        pixels = send(pixels, self.device)
        if places != list(range(len(pixels))):
            pixels = torch.stack([pixels[place] for place in places])  # an index would be sent, and waited for
        return self._encode_moments(pixels)

    @torch.no_grad()
    def _encode_moments(self, pixels: Tensor) -> Tensor:
        """Return mean and standard deviation of the VAE's posterior as one tensor (B,2c,h,w)."""
        most = max(1, _PIXELS_AT_ONCE // math.prod(pixels.shape[-2:]))
        return in_halves(lambda rows: torch.cat(posterior(self.vae, rows), dim=1), pixels, most)

    def text_states(self, captions: Sequence[str]) -> PromptEmbeds:
        """Return the prompt embeddings of ``captions``, encoded as the pipeline itself does, each distinct one once; an
        empty one like the unconditional prompt of the pipeline (zeros for some SDXL bases)."""
        distinct = [caption for caption in dict.fromkeys(captions) if caption]
        texts: dict[str, PromptEmbeds] = {}
        if distinct and self._texts is not None:
            texts = self._texts.get(
                distinct, lambda places: self._encode_captions([distinct[i] for i in places]), len(captions)
            )
        elif distinct:
            found = self._encode_captions(distinct)
            texts = {caption: found[row : row + 1] for row, caption in enumerate(distinct)}
        return PromptEmbeds.join([texts[caption] if caption else self.empty_text for caption in captions])

    def _encode_captions(self, captions: Sequence[str]) -> PromptEmbeds:
        return self.denoiser.encode_captions(captions).to(self.device, self.dtype)

    def texts(self, batch: Batch, dropped: Sequence[bool]) -> PromptEmbeds:
        """Return the prompt embeddings of the batch's captions, of an empty one where ``dropped``. Embeddings that
        come with the batch are used as they are."""
        if batch.texts is not None:
            own = batch.texts.to(self.device, self.dtype)
        elif self._texts is not None:  # then dropped captions are encoded, too: the next epoch finds them
            own = self.text_states(batch.captions)
        else:
            pairs = zip(dropped, batch.captions, strict=True)
            return self.text_states(["" if drop else caption for drop, caption in pairs])
        if not any(dropped):
            return own
        return PromptEmbeds.join([self.empty_text if drop else own[i : i + 1] for i, drop in enumerate(dropped)])

    @property
    def empty_text(self) -> PromptEmbeds:
        """The embeddings of an empty caption, one row: encoded on first use, unless those of a cache were set."""
        if self._empty_text is None:
            self._empty_text = self.denoiser.empty_caption().to(self.device, self.dtype)
        return self._empty_text

    @empty_text.setter
    def empty_text(self, cached: PromptEmbeds) -> None:
        self._empty_text = cached.to(self.device, self.dtype)

    def conditioning(self, batch: Batch, dropped: Sequence[bool]) -> Conditioning:
        """Return the denoiser's inputs: the prompt embeddings, see :meth:`texts`, and what goes with them."""
        height, width = batch.pixels.shape[-2:]
        originals = batch.sizes or (None,) * len(batch)
        return self.denoiser.conditioning(self.texts(batch, dropped), (height, width), originals)

    def adapter_inputs(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Return what the adapter takes for a condition (B,C,H,W) and a mask (B,1,H,W)."""
        return self.plain_adapter.inputs(condition, mask, lambda pixels: encode(self.vae, pixels))

    def output(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, features: Sequence[Tensor]) -> Tensor:
        """Return the output (B,c,h,w) of the frozen denoiser for ``noisy`` (B,c,h,w), with the adapter's ``features``;
        both are converted to its dtype."""
        residuals = [feature.to(self.dtype) for feature in features]
        return self.denoiser.output(noisy.to(self.dtype), times, conditioning, residuals)

    def sampling(self, config: object) -> tuple[Sampling, dict[str, Any]]:
        """Return how to generate images by ``config``, whose ``guidance_scale`` is that of whatever guides the base,
        and further arguments of the pipeline."""
        sampling = Sampling.of(config)
        own = self.denoiser.guidance(dict(self.network.config), dict(self.pipe.config))
        arguments: dict[str, Any] = {}
        if own.scale is None:
            scale = sampling.guidance_scale if own.true_cfg_scale is not None else None
            sampling = replace(sampling, guidance_scale=None, true_cfg_scale=scale)
            arguments = {} if scale is None else {"negative_prompt": own.negative_prompt}
        return replace(sampling, max_sequence_length=self.denoiser.text_length), arguments

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if the adapter cannot process images of this size in pixels."""
        multiple = self.plain_adapter.size_multiple
        if height % multiple or width % multiple:
            raise ValueError(
                f"The images are {width}x{height} pixels (width x height), but this adapter needs multiples of "
                f"{multiple}; choose another resolution."
            )


def load_models(
    settings: TrainSettings, device: torch.device, dtype: torch.dtype | None, without: Collection[str] = ()
) -> Models:
    """Load the frozen base, and load or create its adapter, float32 and trainable. New weights depend on the seed
    alone.

    ``dtype``, ``without``: see :func:`~localctl.training.frozen.load_frozen`. ValueError if base and adapter do not
    fit, before any weights are read.
    """
    adapter = plan_adapter(settings).make(settings.seed).to(device)
    pipe = load_frozen(settings, device, dtype, without)
    if settings.gradient_checkpointing:
        network: Any = denoiser_of(pipe).module
        network.enable_gradient_checkpointing()
    models = Models(pipe, adapter.train(), settings.flow_shift)
    models.denoiser.text_length = settings.max_sequence_length
    if settings.distilled_guidance is not None:
        models.denoiser.distilled_guidance = settings.distilled_guidance
    return models
