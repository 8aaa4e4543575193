"""What transformers on packed latents share: each token is a patch of 2 x 2 latents, and attention is dispatched."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from localctl.denoisers.base import (
    Arguments,
    AttentionLayer,
    Changes,
    Conditioning,
    DenoiserInputs,
    argument,
    with_arguments,
)
from localctl.denoisers.joint import Joint, check_dispatch, dispatched
from localctl.denoisers.two_calls import TwoCalls

_SCALE = 1000  # of the scheduler's timesteps, which these pipelines divide by it


class Packed(TwoCalls):
    """A transformer with joint attention, text first, whose tokens are packed latents (R, Q, 4 c)."""

    image_output = 1
    latents_of_token, latents_of_side = 2, 128

    # Layers and grids

    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Any]]:
        """Return the joint attention of each block."""
        size, joint = self.grid(latent_size), Joint(dispatched, text_first=True)
        return [(AttentionLayer(f"{name}.attn", True, size, joint), block.attn) for name, block in self.blocks]

    def check_attention(self) -> None:
        """Raise a ValueError for a processor, or a backend, that takes no bias."""
        for name, block in self.blocks:
            check_dispatch(block.attn, f"The attention {name}.attn of the {self.name}")

    @property
    def channels(self) -> int:
        """The number c of channels of the latents."""
        return self.module.proj_out.out_features // self.patch**2  # type: ignore[union-attr, operator, return-value]

    # One call

    @abstractmethod
    def grid_of(self, arguments: Arguments) -> tuple[int, int]:
        """Return (h, w) of the image's tokens in a call. ValueError for tokens of further images."""

    @abstractmethod
    def places(self, size: tuple[int, int], rows: int, conditioning: Conditioning) -> dict[str, Any]:
        """Return the arguments of a call that tell the places of tokens, for a grid of ``size`` = (h, w)."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Return the inputs, with the timestep of the scheduler."""
        arguments = (args, dict(kwargs))
        sample, text, timestep = (
            argument(arguments, self.order, name) for name in ("hidden_states", "encoder_hidden_states", "timestep")
        )
        own = sample[..., : self.channels * self.patch**2]  # with inpainting, further channels follow
        return DenoiserInputs(sample, self._unpacked(own, self.grid_of(arguments)), timestep * _SCALE, text, {})

    def write(self, arguments: Arguments, **changes: Unpack[Changes]) -> Arguments:
        """Return the changed arguments, with latents packed."""
        if (latents := changes.get("latents")) is not None:
            own = argument(arguments, self.order, "hidden_states")
            tokens = self.packed(latents).to(own.dtype)
            tokens = torch.cat([tokens, own[..., tokens.shape[-1] :]], dim=-1)
            arguments = with_arguments(arguments, self.order, {"hidden_states": tokens})
        changes["latents"] = None
        return super().write(arguments, **changes)

    def output(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the model output (R, c, h, w), as other transformers do."""
        size = self.grid((noisy.shape[-2], noisy.shape[-1]))
        added = {**(conditioning.added or {}), **self.places(size, len(noisy), conditioning)}
        packed = Conditioning(conditioning.text, added, conditioning.guidance_scale)
        return self._unpacked(super().output(self.packed(noisy), timesteps / _SCALE, packed, features), size)

    # Latents

    def packed(self, latents: Tensor) -> Tensor:
        """Return latents (n, c, h, w) as tokens (n, Q, 4 c)."""
        side = self.patch
        cells = latents.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (n,c,h,2,w,2)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpacked(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return tokens (n, Q, 4 c) as latents (n, c, h, w) of images of ``size`` = (H, W) pixels."""
        side = self.pipe.vae_scale_factor * self.patch
        return self._unpacked(latents, (size[0] // side, size[1] // side))

    def _unpacked(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        side = self.patch
        cells = tokens.unflatten(2, (-1, side, side)).unflatten(1, size)  # (n,h,w,c,2,2)
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the packed latents of one image."""
        side = self.pipe.vae_scale_factor * self.patch
        return 1, (height // side) * (width // side), self.channels * self.patch**2
