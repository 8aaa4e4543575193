"""The models of a training run: the frozen base, with cached encodings, and the adapter to train, new or from a
published T2IAdapter or LocalAdapter. A misfit is found before slow work."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from localctl.adapter import CHOSEN, SHAPE, LocalAdapter
from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import BaseShape, read_shape
from localctl.bases import lasting_name
from localctl.control.compatible import check_fit
from localctl.data.sample import Batch
from localctl.devices import send
from localctl.diffusion import check_schedule, latent_size, posterior, scale_latents
from localctl.pipelines import encode_captions, encode_text, is_xl
from localctl.prompt_embeds import PromptEmbeds
from localctl.seeding import key_seed
from localctl.training.frozen import load_frozen
from localctl.training.halves import in_halves
from localctl.training.memo import MEMO_BYTES, Memo
from localctl.training.settings import TrainSettings


class Models:
    """A frozen base with an adapter on it.

    adapter: what the training step calls; with several processes a wrapper around ``plain_adapter``.
    alphas_cumprod (T,), prediction_type, num_train_timesteps: of the base's own scheduler; stored here because
        validation replaces the pipeline's.
    """

    def __init__(self, pipe: DiffusionPipeline, adapter: LocalAdapter) -> None:
        self.pipe = pipe
        self.plain_adapter = adapter
        self.adapter: Callable[[Tensor], list[Tensor]] = adapter
        self.unet, self.vae = pipe.unet, pipe.vae
        self.prediction_type = pipe.scheduler.config.prediction_type
        check_schedule(pipe.scheduler.alphas_cumprod, self.prediction_type)
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod.float().to(self.device)
        self.num_train_timesteps = len(self.alphas_cumprod)
        self.xl = is_xl(pipe)
        self._empty_text: PromptEmbeds | None = None
        self._texts: Memo[PromptEmbeds] | None = None
        self._moments: Memo[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts."""
        return self.unet.dtype

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """Return the frozen parts by name."""
        parts = self.pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) of the latents for images of this size in pixels."""
        return (self.vae.config.latent_channels, *latent_size(height, width, self.pipe.vae_scale_factor))

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
        return in_halves(lambda rows: torch.cat(posterior(self.vae, rows), dim=1), pixels)

    def text_states(self, captions: Sequence[str]) -> PromptEmbeds:
        """Return the prompt embeddings of ``captions``, encoded as the pipeline itself does, each distinct one once; an
        empty one like the unconditional prompt of the pipeline (zeros for some SDXL bases)."""
        distinct = [caption for caption in dict.fromkeys(captions) if caption]
        texts: dict[str, PromptEmbeds] = {}
        if distinct and self._texts is not None:
            texts = self._texts.get(
                distinct, lambda places: encode_captions(self.pipe, [distinct[i] for i in places]), len(captions)
            )
        elif distinct:
            found = encode_captions(self.pipe, distinct)
            texts = {caption: found[row : row + 1] for row, caption in enumerate(distinct)}
        return PromptEmbeds.join([texts[caption] if caption else self.empty_text for caption in captions])

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
            self._empty_text = encode_text(self.pipe, "")
        return self._empty_text

    @empty_text.setter
    def empty_text(self, cached: PromptEmbeds) -> None:
        self._empty_text = cached.to(self.device, self.dtype)

    def unet_arguments(self, batch: Batch, dropped: Sequence[bool]) -> dict[str, Any]:
        """Return keyword arguments of the U-Net: the prompt embeddings, see :meth:`texts`, and, for SDXL, the sizes of
        the batch's images."""
        height, width = batch.pixels.shape[-2:]
        sizes = batch.sizes or (None,) * len(batch)
        return unet_arguments(self.texts(batch, dropped), time_ids(sizes, (height, width)) if self.xl else None)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if the adapter cannot process images of this size in pixels."""
        multiple = self.plain_adapter.size_multiple
        if height % multiple or width % multiple:
            raise ValueError(
                f"The images are {width}x{height} pixels (width x height), but this adapter needs multiples of "
                f"{multiple}; choose another resolution."
            )


def time_ids(sizes: Sequence[tuple[int, int, int, int] | None], size: tuple[int, int]) -> Tensor:
    """Return SDXL's six numbers per image, (B,6) float32: original height and width, top and left of the crop, target
    height and width.

    Args:
        sizes: the first four for each image; None where unknown: uncropped at ``size``, the pipeline's default.
        size: (height, width) of the batch in pixels.
    """
    known = [(*size, 0, 0) if four is None else four for four in sizes]
    return torch.tensor([[*four, *size] for four in known], dtype=torch.float32)


def unet_arguments(texts: PromptEmbeds, ids: Tensor | None) -> dict[str, Any]:
    """Return the keyword arguments of the U-Net for ``texts`` and, for SDXL, ``ids`` (B,6) of :func:`time_ids`."""
    arguments: dict[str, Any] = {"encoder_hidden_states": texts.states}
    if texts.pooled is not None:
        assert ids is not None
        # Sizes stay float32: half precision cannot represent every number of pixels.
        arguments["added_cond_kwargs"] = {"text_embeds": texts.pooled, "time_ids": send(ids, texts.states.device)}
    return arguments


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
        pipe.unet.enable_gradient_checkpointing()
    return Models(pipe, adapter.train())


OF_SETTINGS = ("mask_resize", "mask_condition", "mask_features", "dim_condition", "unconditional_scale")


@dataclass(frozen=True)
class AdapterPlan:
    """The configuration of the adapter, checked against the base. options: of ``LocalAdapter``. saved: the source of
    its weights; None = initialize them from the seed."""

    options: dict[str, Any]
    saved: SavedAdapter | None = None

    def make(self, seed: int) -> LocalAdapter:
        """Return the adapter, float32 and trainable, without using the global random state."""
        if self.saved is not None:
            kept = {name: value for name, value in self.options.items() if name not in SHAPE}
            return LocalAdapter.from_t2iadapter(self.saved.load().adapter, **kept).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_seed(seed, "adapter"))
            return LocalAdapter(**self.options)


def plan_adapter(settings: TrainSettings, shape: BaseShape | None = None) -> AdapterPlan:
    """Plan the adapter of a run from configs alone. ValueError if settings, saved adapter and base do not fit.

    shape: of the base; None = read it from the base's configs.
    """
    wanted = asdict(settings.adapter)
    saved = None
    if settings.adapter_model_name_or_path is not None:
        saved = find_adapter(settings.adapter_model_name_or_path, settings.base.local_files_only)
        _check_saved(settings, saved)
    shape = shape or read_shape(settings.base)
    fallback = saved.config if saved else _defaults(wanted["adapter_type"], shape)
    options: dict[str, Any] = {name: fallback[name] if wanted[name] is None else wanted[name] for name in CHOSEN}
    options["channels"] = list(options["channels"])
    options |= {name: wanted[name] for name in OF_SETTINGS}
    weights = wanted["level_weights"] or (saved.config.get("level_weights") if saved else None)
    options["level_weights"] = weights and list(weights)
    options["in_channels"] = settings.condition.channels
    way_out = "choose adapter=auto, which takes type, channels and downscale factor from the base"
    check_fit(options, shape, f"the adapter {saved.place} belongs to another kind of base" if saved else way_out)
    options |= {"condition": settings.condition.recorded(), "base": lasting_name(settings.base.name)}
    return AdapterPlan(options, saved)


def _defaults(adapter_type: str | None, shape: BaseShape) -> dict[str, Any]:
    """Return what fits the U-Net: one feature per level for SD, two on the finest level that attends for SDXL."""
    kind = adapter_type or ("full_adapter_xl" if shape.xl else "full_adapter")
    channels = tuple(shape.parts["unet"]["block_out_channels"])
    if kind == "full_adapter_xl":
        channels = (*channels, channels[-1])
    elif kind == "light_adapter":  # it repeats its last level itself
        channels = channels[:-1]
    factor = shape.vae_scale_factor * (2 if shape.xl else 1)
    return {"adapter_type": kind, "channels": channels, "num_res_blocks": 2, "downscale_factor": factor}


def _check_saved(settings: TrainSettings, saved: SavedAdapter) -> None:
    """Raise ValueError if the settings ask for another shape than the saved adapter has."""
    saved.check_channels(settings.condition)
    name = saved.name
    for key in CHOSEN:
        wanted, actual = getattr(settings.adapter, key), saved.config.get(key)
        actual = tuple(actual) if isinstance(actual, list) else actual
        if wanted is not None and wanted != actual:
            raise ValueError(
                f"adapter.{key} is {wanted} but the adapter {name} has {actual}; set adapter.{key}=null to use "
                "its own value."
            )
