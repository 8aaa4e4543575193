"""The protocol of a denoiser: what controls, sampling and weight search may ask of a family's inside.

Letters of shapes: R rows of a batch, K tokens, c latent channels, (h, w) the latents' grid, (H, W) pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from localctl.layout import Layout

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of one call of the module, by position and by name


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer: its ``name`` in the denoiser, whether it looks at the text (``cross``) or at the image
    itself, and the (h, w) of its cells."""

    name: str
    cross: bool
    size: tuple[int, int]

    @property
    def cells(self) -> int:
        """h * w."""
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class DenoiserInputs:
    """What the denoiser is given in one call; not to be written to.

    sample: as it is given. latents: the noisy latents in it (R, c, h, w), without a mask and an image to be inpainted,
        and not packed. text: (R, K, C), of the prompts. added: for SDXL, the pooled texts and sizes by name.
    """

    sample: Tensor
    latents: Tensor
    timestep: Tensor | float
    text: Tensor
    added: Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockResiduals:
    """What a ControlNet adds: to each skip connection, finest first, ``down`` (R, c, h, w) each, and to what comes out
    of the middle block, ``middle``."""

    down: list[Tensor]
    middle: Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is given beside latents and timestep. text: (R, K, C), the negative prompt's row first if there
    is guidance; added: what SDXL wants besides, or None."""

    text: Tensor
    added: dict[str, Tensor] | None
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Whether there is a row of the negative prompt."""
        return self.guidance_scale > 1


class Denoiser(ABC):
    """The denoiser of one pipeline.

    Args:
        module: the network; what is hooked, checked and run.
        pipe: its pipeline; None where only the network's shape is asked for.
    """

    name: ClassVar[str]  # what messages call it
    attribute: ClassVar[str]  # where a pipeline holds it
    not_per_row: ClassVar[tuple[str, ...]] = ()  # arguments of a call whose tensors do not belong to the batch's rows

    def __init__(self, module: nn.Module, pipe: Any = None) -> None:
        self.module = module
        self.pipe = pipe

    # Layers and grids

    @abstractmethod
    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Attention]]:
        """All attention layers that controls may steer, in the order they run, for latents of this (h, w)."""

    @abstractmethod
    def choose_layers(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Return the names of the cross-attention layers meant, in the order they run; ``wanted``: names of groups of
        layers, None: those that layout guidance reads by default. ValueError for a group that is not there."""

    @abstractmethod
    def residual_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        """(c, h, w) of each residual that the denoiser takes between its blocks, finest first."""

    @abstractmethod
    def is_block(self, module: nn.Module, name: str) -> bool:
        """Whether another ``forward`` on this module of the denoiser, of this name, could skip what controls do."""

    @abstractmethod
    def check_controlnet(self, config: Mapping[str, Any]) -> None:
        """ValueError if a ControlNet of this config belongs to another base."""

    # One call

    @abstractmethod
    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Return the inputs among the arguments of a call."""

    @abstractmethod
    def write(
        self,
        arguments: Arguments,
        *,
        latents: Tensor | None = None,
        text: Tensor | None = None,
        residuals: list[Tensor] | None = None,
        skips: BlockResiduals | None = None,
    ) -> Arguments:
        """Return the arguments with other latents (R, c, h, w) and text, and with residuals added to those already
        there."""

    @abstractmethod
    def conditional(self, rows: int, images: int) -> tuple[bool, ...]:
        """For each row of a call for so many images, whether it carries the prompt; such rows come last, one per image.
        ValueError for a number of rows that is not known."""

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model output for latents (1, c, h, w) of the scheduler, after guidance."""

    # Latents and parameterisation

    @abstractmethod
    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the ``latents`` that the pipeline takes for one image of height x width pixels."""

    @property
    @abstractmethod
    def own_size(self) -> tuple[int, int]:
        """(H, W) of the images that the base was made for."""

    @property
    def prediction_type(self) -> str:
        """What the model output is: ``epsilon``, ``v_prediction`` or ``sample``."""
        return self.pipe.scheduler.config.prediction_type

    # Text

    @abstractmethod
    def token_positions(self, layout: Layout) -> list[tuple[int, ...]]:
        """For each region, which of the K tokens are its phrase's. ValueError as for
        :func:`localctl.tokens.token_positions`."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str], arguments: Mapping[str, Any]) -> Tensor:
        """(n, K, C): texts as the pipeline encodes prompts, with the device and settings of a running call, whose
        ``encode_prompt`` was given ``arguments``."""

    @abstractmethod
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning of one image of ``size`` = (H, W), as the stock pipelines make it. Inside ``attach``,
        this begins a call."""


def add_residuals(first: Sequence[Tensor] | None, second: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Return the sum of two lists of residuals, level by level; None counts as nothing. The list is a new one."""
    if first is None or second is None:
        return list(first or second or ()) or None
    return [b if a is None else a if b is None else a + b for a, b in zip_longest(first, second)]
