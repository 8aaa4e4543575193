"""What is random in an update of a denoiser, and its loss, a function of tensors that a CUDA graph can hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from localctl.diffusion import FLOW, add_noise, timesteps_from_uniform, training_target
from localctl.seeding import key_seed
from research.micro_base.focus import Focus, focus_loss, record_attention
from research.micro_base.preference import Preference

FOCUS_WEIGHT = 0.04
FAR, NEAR = 0.25, 2.25  # weights of the error away from objects, and at objects
SHAPES_FORM, PLACES_FORM = 190.0, 700.0  # from these timesteps on
HIDDEN = 850  # from this timestep on, the noise hides the scene: abar < 7e-4
MEAN_WEIGHT = 5.0  # of the error against a mean of scenes, which varies little: most of its gradient is signal
TEXTURE = 0.06  # share of the timesteps below both; there abar > 0.7
Record = TypeVar("Record")


@dataclass(frozen=True)
class Recipe:
    """How a denoiser is trained.

    The U-Net predicts epsilon with the min-SNR weight, gamma 5 (arXiv 2303.09556), or v (arXiv 2202.00512) without a
    weight; the transformer predicts the velocity of flow matching (``flow``). noisy is of the U-Net's timesteps alone.
    empty: share of empty captions. padding_dropout: share of captions with the padding of the empty prompt. noisy:
    share of timesteps from 700 on, where the number and the places of objects form.
    """

    prediction_type: str = "v_prediction"
    empty: float = 0.1
    padding_dropout: float = 0.5
    noisy: float = 0.22

    def timesteps(self, batch: int, rng: np.random.Generator) -> np.ndarray:
        """Sample timesteps (B,) int64 in [0, 1000)."""
        return sample_flow(batch, rng) if self.prediction_type == FLOW else sample_timesteps(batch, rng, self.noisy)


RECIPE = Recipe()


@dataclass(frozen=True)
class LatentCache:
    """Encoded images and captions.

    latents: fp16 (n, 4, 16, 16), scaled. states: fp16 (captions, T, width), of T tokens, for the transformer with the
    pooled embedding as the last one; row 0 is the empty prompt. lengths: (captions,), tokens before the padding.
    caption_of: (n,), row of ``states`` for each scene.
    """

    latents: Tensor
    states: Tensor
    lengths: Tensor
    caption_of: Tensor


@dataclass(frozen=True)
class Sampled:
    """What is random in an update of B scenes.

    scenes: (B,) int64. is_empty: bool (B,), replace the caption by the empty one. noise: (B, 4, 16, 16). timesteps:
    (B,) int64. bare: bool (B,), replace the padding by that of the empty prompt.
    """

    scenes: Tensor
    is_empty: Tensor
    noise: Tensor
    timesteps: Tensor
    bare: Tensor


def to(record: Record, device: torch.device | str, wait: bool = True) -> Record:
    """Return a record of tensors on a device. wait: for the copy, and with it for all that runs on the device."""
    moved: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    for name, value in moved.items():
        source = value if wait or value.device.type != "cpu" else value.pin_memory()
        moved[name] = source.to(device, non_blocking=not wait)
    return type(record)(**moved)


def sample_timesteps(batch: int, rng: np.random.Generator, noisy: float = RECIPE.noisy) -> np.ndarray:
    """Sample timesteps (B,) in [0, 1000), one stratum of the distribution per row, so that all batches spread alike.

    A share ``noisy`` is in [700, 1000), where the number and the places of objects form, and 6 % are below 190; shapes
    form between.
    """
    u = (np.arange(batch) + rng.random(batch)) / batch
    knots = [0.0, SHAPES_FORM, PLACES_FORM, 999.999]
    return np.interp(u, [0.0, TEXTURE, 1 - noisy, 1.0], knots).astype(np.int64)


def sample_flow(batch: int, rng: np.random.Generator) -> np.ndarray:
    """Sample timesteps (B,) of flow matching in [0, 1000), before the shift, one stratum per row."""
    u = torch.from_numpy((np.arange(batch) + rng.random(batch)) / batch)
    return timesteps_from_uniform(u, 1000, "logit_normal").numpy()


@dataclass(frozen=True)
class Sampler:
    """Samples updates of ``batch`` scenes of a cache.

    shape: of the cache's latents. odds: (n,), cumulative probability of each scene; None: equal.
    """

    shape: tuple[int, ...]
    odds: Tensor | None
    batch: int
    recipe: Recipe
    seed: int
    device: torch.device

    def __call__(self, rng: np.random.Generator, noise: Tensor | None = None) -> Sampled:
        """Sample an update on the CPU; ``noise`` replaces the noise sampled with ``rng``."""
        scenes = self._scenes(rng)
        is_empty = torch.from_numpy(rng.random(self.batch) < self.recipe.empty)
        if noise is None:
            noise = torch.from_numpy(rng.standard_normal((self.batch, *self.shape[1:]), dtype=np.float32))
        timesteps = torch.from_numpy(rng.permutation(self.recipe.timesteps(self.batch, rng)))
        bare = torch.from_numpy(rng.random(self.batch) < self.recipe.padding_dropout)
        return Sampled(scenes, is_empty, noise, timesteps, bare)

    def on_device(self, step: int) -> Sampled:
        """Sample update ``step`` on the device, where its noise is generated."""
        generator = torch.Generator(self.device).manual_seed(key_seed(self.seed, "noise", step))
        noise = torch.randn((self.batch, *self.shape[1:]), generator=generator, device=self.device)
        sampled = self(np.random.default_rng([self.seed, step]), noise)
        return sampled if self.device.type == "cpu" else to(sampled, self.device, wait=False)

    def _scenes(self, rng: np.random.Generator) -> Tensor:
        """Sample numbers of scenes (B,): uniformly, or by the odds, one stratum per row."""
        if self.odds is None:
            return torch.from_numpy(rng.integers(self.shape[0], size=self.batch))
        places = torch.from_numpy((np.arange(self.batch) + rng.random(self.batch)) / self.batch)
        return torch.searchsorted(self.odds, places).clamp(max=self.shape[0] - 1)


def text_batch(cache: LatentCache, rows: Tensor, bare: Tensor) -> Tensor:
    """Return text states (B, T, width), in the rows ``bare`` (bool (B,)) with the empty prompt's states as padding.

    This makes the denoiser attend to the words, not to the summary in the padding: region control steers words.
    """
    states = cache.states[rows].float()
    position = torch.arange(states.shape[1], device=states.device)
    is_padding = position[None] >= cache.lengths[rows][:, None]  # (B, 77)
    return torch.where((is_padding & bare[:, None])[..., None], cache.states[0].float(), states)


class DenoiserLoss(ABC):
    """The loss of an update and its terms, of what was sampled; all tensors are on the denoiser's device.

    settled, seen: timesteps between which the weight of objects, and that of attention, fall from 1 to 0.
    """

    settled: ClassVar[tuple[float, float]]
    seen: ClassVar[tuple[float, float]]

    def __init__(self, cache: LatentCache, focus: Focus | None) -> None:
        """``focus``: objects of the cached scenes."""
        self.cache, self.focus = cache, focus
        self.preference: Preference | None = None
        self.recorded: list[Tensor] = []

    @abstractmethod
    def predict(self, latents: Tensor, sampled: Sampled, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the denoiser's output of noised latents, its target, and the weight of each sample's error."""

    @abstractmethod
    def release(self) -> None:
        """Take off what records attention."""

    def __call__(self, sampled: Sampled) -> dict[str, Tensor]:
        """Return the loss and its terms, scalars."""
        self.recorded.clear()
        rows = self.cache.caption_of[sampled.scenes].masked_fill(sampled.is_empty, 0)
        latents = self.cache.latents[sampled.scenes].float()
        states = text_batch(self.cache, rows, sampled.bare)
        output, target, weight = self.predict(latents, sampled, states)
        error = (output.float() - target).square().mean(1)  # (B, 16, 16)
        mse = error.mean((1, 2))  # (B,)
        if self.focus is None:
            terms = {"loss": (mse * weight).mean()}
        else:
            terms = self._focused(self.focus, sampled, error, weight)
        if self.preference is not None:
            preferred, told = self._preferred(self.preference, sampled, states, latents, mse)
            terms |= {"loss": terms["loss"] + preferred, "told": told}
        return terms | {"mse": mse.mean()}

    def errors(self, latents: Tensor, sampled: Sampled, states: Tensor) -> Tensor:
        """Return the squared error (B,) of each sample."""
        output, target, _ = self.predict(latents, sampled, states)
        return (output.float() - target).square().mean((1, 2, 3))

    def _preferred(
        self, preference: Preference, sampled: Sampled, states: Tensor, right: Tensor, mse: Tensor
    ) -> tuple[Tensor, Tensor]:
        wrong = preference.wrong[sampled.scenes].float()
        with torch.no_grad():
            reference = preference.errors(right, sampled, states) - preference.errors(wrong, sampled, states)
        return preference.loss(mse, self.errors(wrong, sampled, states), reference, ~sampled.is_empty)

    def _focused(self, focus: Focus, sampled: Sampled, error: Tensor, weight: Tensor) -> dict[str, Tensor]:
        scenes, t = sampled.scenes, sampled.timesteps.float()
        near = focus.near[scenes].float()
        # With much noise, the places of objects are not determined: a larger weight there would favour objects.
        settled = _fading(t, *self.settled)[:, None, None]
        weighted = (error * (1 + settled * (FAR + (NEAR - FAR) * near - 1))).mean((1, 2))
        relations = focus.relations[scenes]
        # A relation tells of places that the noise leaves open.
        seen = torch.where(relations >= 0, 1.0, _fading(t, *self.seen)) * ~sampled.is_empty
        masks, tokens = focus.masks[scenes].float(), focus.tokens[scenes]
        attention, share = focus_loss(self.recorded, masks, tokens, relations, seen)
        loss = (weighted * weight).mean() + FOCUS_WEIGHT * attention
        objects = (error * near).sum() / near.sum().clamp(min=1)
        return {"loss": loss, "objects": objects, "attention": share}


def _fading(t: Tensor, start: float, end: float) -> Tensor:
    """Return weights that fall from 1 at ``start`` to 0 at ``end``."""
    return ((end - t) / (end - start)).clamp(0, 1)


class UNetLoss(DenoiserLoss):
    """The loss of the U-Net."""

    settled = (300.0, 450.0)
    seen = (600.0, 800.0)

    def __init__(
        self, unet: UNet2DConditionModel, cache: LatentCache, alphas: Tensor, recipe: Recipe, focus: Focus | None
    ) -> None:
        """``alphas``: cumulative, (1000,). focus: objects of the cached scenes."""
        super().__init__(cache, focus)
        self.unet, self.alphas, self.recipe = unet, alphas, recipe
        self.dtype = unet.dtype  # once: the property looks at all layers
        snr = alphas / (1 - alphas)
        self.weight = snr.clamp(max=5) / snr if recipe.prediction_type == "epsilon" else torch.ones_like(snr)
        self.recorded = [] if focus is None else record_attention(unet)

    def predict(self, latents: Tensor, sampled: Sampled, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, target and weights, as the prediction type says."""
        t = sampled.timesteps
        sample = add_noise(latents, sampled.noise, t, self.alphas)
        clean, weight = self._with_means(sample.latents, sampled)
        target = training_target(replace(sample, latents=clean), self.alphas, self.recipe.prediction_type)
        output = self.unet(sample.noisy.to(self.dtype), t, states.to(self.dtype)).sample
        return output, target, self.weight[t] * weight

    def _with_means(self, latents: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
        """Return the latents to predict, expected ones where there are and the noise hides the scene, and weights."""
        one = torch.ones_like(sampled.timesteps, dtype=torch.float32)
        if self.focus is None or not len(self.focus.expected):
            return latents, one
        expected = self.focus.expected[sampled.scenes].float()
        hidden = (sampled.timesteps >= HIDDEN) & ~sampled.is_empty & (expected != latents).flatten(1).any(1)
        return torch.where(hidden[:, None, None, None], expected, latents), torch.where(hidden, MEAN_WEIGHT, one)

    def release(self) -> None:
        """Set the attention processors that record nothing."""
        self.unet.set_attn_processor(AttnProcessor2_0())
