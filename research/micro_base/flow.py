"""The loss of the transformer: flow matching (arXiv 2210.02747), and its attention from image to words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

from localctl.diffusion import FLOW, add_noise, flow_sigmas, training_target
from research.micro_base.focus import Focus
from research.micro_base.unet_loss import DenoiserLoss, LatentCache, Sampled, text_batch

FLOW_SHIFT = 3.0  # of the sigmas, as in SD3 (arXiv 2403.03206, section 5.3.2)
# Without its third text encoder, SD3's pipeline appends ``max_sequence_length`` (256 if not given) tokens of zeros to
# the text. They are equal in every layer, so n of them are one with log(n) added to its attention scores. Each row of a
# batch has another number, so that images do not depend on it.
ZEROS = (256, 0, 256, 16, 256, 1, 0, 64)


class JointAttention(TorchFunctionMode):
    """While active: the last token of each sequence counts several times, and attention to the words is recorded.

    recorded: the attention of each call among the words alone, mean over heads (B, cells, words) float32.
    """

    def __init__(self, words: int, recorded: list[Tensor] | None) -> None:
        """``words``: tokens of the text, which follow the image, before the last token. recorded: None = nothing."""
        super().__init__()
        self.words, self.recorded = words, recorded
        self._bias: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, with the last token's bias if it is the attention."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args  # (B, heads, cells + words + 1, D)
        cells = query.shape[2] - self.words - 1
        if self.recorded is not None:
            scores = query[:, :, :cells] @ key[:, :, cells:-1].mT * query.shape[-1] ** -0.5
            self.recorded.append(scores.float().softmax(-1).mean(1))
        return func(query, key, value, attn_mask=self._bias_like(query))

    def _bias_like(self, query: Tensor) -> Tensor:
        """Return the bias (B, 1, 1, cells + words + 1), made once, as a CUDA graph cannot hold values of the host."""
        shape = (len(query), 1, 1, query.shape[2])
        if self._bias is None or self._bias.shape != shape or self._bias.dtype != query.dtype:
            counts = [ZEROS[row % len(ZEROS)] for row in range(len(query))]
            bias = torch.zeros(shape)
            bias[..., -1] = torch.tensor(counts).log()[:, None, None]
            self._bias = bias.to(query.device, query.dtype)
        return self._bias


def velocity(transformer: SD3Transformer2DModel, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """Return the output (B, 4, 16, 16) for text states (B, words + 1, width), the last one pooled.

    In its place, the sequence has one token of zeros.
    """
    words = torch.cat([states[:, :-1], torch.zeros_like(states[:, :1])], 1)
    return transformer(noisy, words, states[:, -1], timesteps).sample


class Teacher:
    """A trained U-Net, whose predictions are velocities to learn from, without the noise of single scenes.

    Flow matching learns the mean of eps - z0, given z_t; the U-Net, of another schedule, knows it at the timestep with
    the same noise-to-signal ratio.
    """

    def __init__(self, unet: UNet2DConditionModel, cache: LatentCache, alphas: Tensor) -> None:
        """``unet`` predicts v. cache: the U-Net's states of the same captions. alphas: cumulative, decreasing."""
        self.unet, self.cache, self.ratios = unet, cache, ((1 - alphas) / alphas).sqrt()

    @torch.no_grad()
    def __call__(self, noisy: Tensor, sigma: Tensor, sampled: Sampled) -> Tensor:
        """Return velocities (B, 4, 16, 16) of latents with the noise ``sigma`` (B,)."""
        timesteps, sigma = self._timesteps(sigma), sigma[:, None, None, None]
        rows = self.cache.caption_of[sampled.scenes].masked_fill(sampled.is_empty, 0)
        states = text_batch(self.cache, rows, sampled.bare)
        scale = ((1 - sigma) ** 2 + sigma**2).sqrt()
        signal, noise = (1 - sigma) / scale, sigma / scale  # of variance-preserving latents
        scaled = noisy / scale
        v = self.unet(scaled.to(self.unet.dtype), timesteps, states.to(self.unet.dtype)).sample.float()
        return (noise - signal) * scaled + (noise + signal) * v  # eps = noise x + signal v, z0 = signal x - noise v

    def _timesteps(self, sigma: Tensor) -> Tensor:
        """Return the U-Net's timesteps (B,), between whole ones, with the ratios sigma / (1 - sigma)."""
        ratio = sigma / (1 - sigma)
        above = torch.searchsorted(self.ratios, ratio).clamp(1, len(self.ratios) - 1)
        low, high = self.ratios[above - 1], self.ratios[above]
        return above - 1 + ((ratio - low) / (high - low)).clamp(0, 1)


class FlowLoss(DenoiserLoss):
    """The loss of the transformer, z_t = (1 - sigma) z0 + sigma eps and v = eps - z0, without weights.

    Timesteps are those of :func:`localctl.diffusion.flow_sigmas`. Those of ``settled`` and ``seen`` have the
    noise-to-signal ratios of the U-Net's.
    """

    settled = (290.0, 460.0)
    seen = (670.0, 890.0)

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        cache: LatentCache,
        focus: Focus | None,
        teacher: Teacher | None = None,
    ) -> None:
        """``focus``: objects of the cached scenes. teacher: gives the target in place of the scenes."""
        super().__init__(cache, focus)
        self.sigmas = flow_sigmas(1000, FLOW_SHIFT).to(cache.latents.device)
        self.transformer, self.teacher = transformer, teacher
        self.dtype = transformer.dtype
        self.attention = JointAttention(cache.states.shape[1] - 1, None if focus is None else self.recorded)

    def predict(self, latents: Tensor, sampled: Sampled, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return velocity, target and weights of 1. The last of ``states`` is the pooled embedding."""
        sample = add_noise(latents, sampled.noise, sampled.timesteps, self.sigmas, FLOW)
        sigma = self.sigmas[sampled.timesteps]
        with self.attention:
            output = velocity(self.transformer, sample.noisy.to(self.dtype), 1000 * sigma, states.to(self.dtype))
        del self.recorded[: len(self.recorded) // 3]  # the first blocks hardly know yet what is where
        if self.teacher is None:
            target = training_target(sample, self.sigmas, FLOW)
        else:
            target = self.teacher(sample.noisy, sigma, sampled)
        return output, target, torch.ones_like(sigma)

    def release(self) -> None:
        """Do nothing: attention is recorded during a call only."""
