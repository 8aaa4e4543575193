"""The protocol of a denoiser: how controls, sampling and weight search access the internals of a family.

Symbols in shapes: R rows of a batch, K tokens, c latent channels, (h, w) the latents' grid, (H, W) pixels.
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
from localctl.prompt_weights import Text

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of one call of the module, by position and by name


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a denoiser.

    name: of the module in the denoiser. cross: True for cross-attention (to the text), False for self-attention. size:
    (h, w) of its cells.
    """

    name: str
    cross: bool
    size: tuple[int, int]

    @property
    def cells(self) -> int:
        """The number of cells, h * w."""
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class DenoiserInputs:
    """The inputs of one call of the denoiser; must not be modified.

    sample: the first input, as passed. latents: the noisy latents in it (R, c, h, w), unpacked and without the mask and
        image channels of inpainting. timestep: as passed. text: the prompt embeddings (R, K, C). added: for SDXL, the
        pooled embeddings and the sizes, by name.
    """

    sample: Tensor
    latents: Tensor
    timestep: Tensor | float
    text: Tensor
    added: Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockResiduals:
    """Residuals as a ControlNet adds them.

    down: one (R, c, h, w) per skip connection, finest first. middle: (R, c, h, w), for the output of the middle block.
    """

    down: list[Tensor]
    middle: Tensor


@dataclass(frozen=True)
class Conditioning:
    """The inputs of the denoiser other than latents and timestep.

    text: prompt embeddings (R, K, C), with guidance the negative prompt's row first. added: SDXL's further inputs by
    name, or None. guidance_scale: of classifier-free guidance; there is guidance above 1.
    """

    text: Tensor
    added: dict[str, Tensor] | None
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Return whether there is a row of the negative prompt."""
        return self.guidance_scale > 1


class Denoiser(ABC):
    """The denoiser of one pipeline.

    Args:
        module: the network, to hook, check and run.
        pipe: its pipeline; may be None where only the network's shapes are needed.
    """

    name: ClassVar[str]  # used in messages
    attribute: ClassVar[str]  # of the pipeline, which holds the module
    not_per_row: ClassVar[tuple[str, ...]] = ()  # arguments of a call whose first axis is not the batch's rows

    def __init__(self, module: nn.Module, pipe: Any = None) -> None:
        self.module = module
        self.pipe = pipe

    # Layers and grids

    @abstractmethod
    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Attention]]:
        """Return all attention layers that controls may steer, in the order they run, for latents of this (h, w)."""

    @abstractmethod
    def choose_layers(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Return the names of the chosen cross-attention layers, in the order they run.

        ``wanted``: names of groups of layers; None: the layers that layout guidance reads by default. ValueError for an
        unknown group.
        """

    @abstractmethod
    def residual_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return (c, h, w) of each residual that the denoiser takes between its blocks, finest first."""

    @abstractmethod
    def is_block(self, module: nn.Module, name: str) -> bool:
        """Return whether replacing the ``forward`` of this module, of this name, could skip what controls do."""

    @abstractmethod
    def check_controlnet(self, config: Mapping[str, Any]) -> None:
        """Raise a ValueError if a ControlNet of this config was made for another base."""

    @property
    def image_adapters(self) -> int:
        """The number of IP-Adapters that are loaded."""
        return 0

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
        images: list[Tensor] | None = None,
    ) -> Arguments:
        """Return the arguments with these latents (R, c, h, w), text (R, K, C) and image embeddings (R, n, ...) of
        each IP-Adapter in place of their own, and with the residuals added to their own."""

    @abstractmethod
    def conditional(self, rows: int, images: int) -> tuple[bool, ...]:
        """Return for each row of a call whether it carries the prompt; such rows come last, one per image.

        ``rows``: of the call; ``images``: how many it generates. ValueError for an unsupported number of rows.
        """

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model output (1, c, h, w), after guidance, for latents (1, c, h, w) of the scheduler."""

    # Latents and parameterisation

    @abstractmethod
    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the ``latents`` that the pipeline takes for one image of height x width pixels."""

    @property
    @abstractmethod
    def own_size(self) -> tuple[int, int]:
        """The (H, W) of the images that the base was trained for."""

    @property
    def prediction_type(self) -> str:
        """The kind of the model output: ``epsilon``, ``v_prediction`` or ``sample``."""
        return self.pipe.scheduler.config.prediction_type

    # Text

    @abstractmethod
    def token_positions(self, layout: Layout) -> list[tuple[int, ...]]:
        """Return for each region the positions of its phrase among the K tokens.

        ValueError as for :func:`localctl.tokens.token_positions`.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> Tensor:
        """Encode n texts as the pipeline encodes prompts; return (n, K, C).

        ``arguments``: of the running call's ``encode_prompt``, which give device and settings.
        """

    @abstractmethod
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning of one image of ``size`` = (H, W), as the stock pipelines compute it.

        Inside ``attach``, this begins a call.
        """


def add_residuals(first: Sequence[Tensor] | None, second: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Return the sum of two lists of residuals, level by level, as a new list; None means no residuals."""
    if first is None or second is None:
        return list(first or second or ()) or None
    return [b if a is None else a if b is None else a + b for a, b in zip_longest(first, second)]
