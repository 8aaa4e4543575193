"""The protocol of a denoiser: how controls, sampling and weight search access the internals of a family.

Symbols in shapes: R rows of a batch, K tokens, c latent channels, (h, w) the latents' grid, (H, W) pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from localctl.denoisers.configs import Configured
from localctl.denoisers.joint import Joint
from localctl.denoisers.trained import Conditioning as Conditioning
from localctl.denoisers.trained import Trained
from localctl.diffusion import is_flow
from localctl.layout import Layout
from localctl.prompt_weights import Text

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of one call of the module, by position and by name


# The residuals of a transformer's blocks among the arguments of a call, taken out before its forward.
RESIDUALS = "localctl_residuals"


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a denoiser, or one of the two halves of a joint one: image to text, and image to image.

    name: of the module in the denoiser. cross: True for cross-attention (to the text), False for self-attention. size:
    (h, w) of its cells. joint: for the halves of a joint layer.
    """

    name: str
    cross: bool
    size: tuple[int, int]
    joint: Joint | None = None

    @property
    def cells(self) -> int:
        """The number of cells, h * w."""
        return self.size[0] * self.size[1]

    @property
    def halves(self) -> tuple[AttentionLayer, ...]:
        """This layer; of a joint one with text, which is listed as cross-attention, its halves, first the text's."""
        return (self,) if self.joint is None or not self.cross else (self, replace(self, cross=False))


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


class Changes(TypedDict, total=False):
    """Changes of the arguments of a call; None: none.

    latents: (R, c, h, w), text: (R, K, C), images: (R, n, ...) of each IP-Adapter, in place of its own. residuals,
    skips: added to its own.
    """

    latents: Tensor | None
    text: Tensor | None
    residuals: Sequence[Tensor | None] | None
    skips: BlockResiduals | None
    images: list[Tensor] | None


def check_changes(changes: Changes) -> None:
    """Raise a TypeError for a change of a name that there is not."""
    known = Changes.__annotations__
    if unknown := sorted(set(changes) - set(known)):
        raise TypeError(f"{unknown[0]!r} is no change of a call's arguments; known are {', '.join(known)}.")


class Denoiser(Configured, Trained):
    """The denoiser of one pipeline.

    Args:
        module: the network, to hook, check and run.
        pipe: its pipeline; may be None where only the network's shapes are needed.
    """

    attribute: ClassVar[str]  # of the pipeline, which holds the module
    classes: ClassVar[tuple[str, ...]] = ()  # names of the module's class; empty for any
    not_per_row: ClassVar[tuple[str, ...]] = ()  # arguments of a call whose first axis is not the batch's rows
    groups: ClassVar[tuple[str, ...]]  # of layers, which hold all layers together, for choose_layers
    absent_hooks: ClassVar[tuple[str, ...]] = ()  # of bound controls, which have no place in this family
    weighs_prompts: ClassVar[bool] = False  # whether prompts with weights, and longer ones, can be encoded
    repeats = False  # whether the running call repeats another of its step, with blocks left out
    encodes_always: ClassVar[bool] = True  # whether the pipeline calls ``encode_prompt`` with embeddings, too
    own_arguments: ClassVar[Mapping[str, Any]] = {}  # of the pipeline, unlike its defaults, for sampling with controls

    def __init__(self, module: nn.Module, pipe: Any = None) -> None:
        self.module = module
        self.pipe = pipe

    # Layers and grids

    @abstractmethod
    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Any]]:
        """Return all attention layers that controls may steer, each with its module, in the order they run, for latents
        of this (h, w). A joint layer is listed once."""

    @abstractmethod
    def choose_layers(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Return the names of the chosen cross-attention layers, in the order they run.

        ``wanted``: names of groups of layers; None: the layers that layout guidance reads by default. ValueError for an
        unknown group.
        """

    @abstractmethod
    def residual_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return (c, h, w) of each residual that the denoiser takes between its blocks, in the order they run."""

    def placed(self, features: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the features of an adapter as residuals, one for each of the first :meth:`residual_shapes`."""
        return features

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

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which the calls of the pipeline are steered, for families whose calls are to be told apart."""
        yield

    def begins_call(self) -> bool:
        """Return whether a call of ``encode_prompt`` is that of the prompt, which begins a call of the pipeline; some
        encode the negative prompt by a second one."""
        return True

    def check_call(self, arguments: Mapping[str, Any], layouts: Sequence[Layout]) -> None:
        """Raise a ValueError if controls would not act in a call of the pipeline for these layouts.

        ``arguments``: of its ``encode_prompt``.
        """

    def check_attention(self) -> None:
        """Raise a ValueError if an attention layer takes no bias from controls."""

    @contextmanager
    def running(self, arguments: Arguments) -> Iterator[Arguments]:
        """Context of one run of the module with ``arguments`` as written; yields those that its ``forward`` takes."""
        yield arguments

    @abstractmethod
    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Return the inputs among the arguments of a call."""

    @abstractmethod
    def write(self, arguments: Arguments, **changes: Unpack[Changes]) -> Arguments:
        """Return the arguments of a call with these changes."""

    def copied(self, layouts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the layout of each image, for those that the arguments of ``encode_prompt`` tell of."""
        return layouts

    def join_texts(self, arguments: Arguments, texts: Tensor, hidden: Tensor | None) -> Arguments:
        """Return the arguments of a call with ``texts`` (p, K, C) for its last p rows, whose own texts are left out.

        ``hidden``: (p, 1, K), a bias that hides what shorter texts are filled up with; None for texts of one length.
        ValueError for another length than the call's prompts have.
        """
        own = self.read(*arguments).text[: -len(texts)]
        if own.shape[1:] != texts.shape[1:] or hidden is not None:
            raise ValueError(
                f"The texts of regions have {texts.shape[1]} tokens but the call's prompt has {own.shape[1]}; pass "
                "prompts as text, and the same max_sequence_length throughout."
            )
        return self.write(arguments, text=torch.cat([own, texts.to(own)]))

    def conditional(self, rows: int, images: int) -> tuple[bool, ...]:
        """Return for each row of a call whether it carries the prompt; such rows come last, one per image or none.

        Here: one per image, or two, first all negative prompts, then all prompts. ``rows``: of the call; ``images``:
        how many it generates. ValueError for another number of rows.
        """
        if rows not in (images, 2 * images):
            raise self.wrong_rows(rows, images)
        return (False,) * (rows - images) + (True,) * images

    def has_negative(self, conditional: Sequence[bool]) -> bool:
        """Return whether the running call of the pipeline has a negative prompt, by the rows of the module's call."""
        return not all(conditional)

    def wrong_rows(self, rows: int, images: int) -> ValueError:
        """Make the error for a call with another number of rows than the family's guidance has."""
        return ValueError(
            f"The {self.name} was called with {rows} rows for {images} images; controls work with plain sampling or "
            "classifier-free guidance, not with methods that add rows of their own."
        )

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model output (1, c, h, w), after guidance, for latents (1, c, h, w) of the scheduler."""

    # Latents and parameterisation

    def packed(self, latents: Tensor) -> Tensor:
        """Return latents (n, c, h, w) as the pipeline passes them to its scheduler."""
        return latents

    def unpacked(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the scheduler's latents of images of ``size`` = (H, W) pixels as (n, c, h, w)."""
        return latents

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the ``latents`` that the pipeline takes for one image of height x width pixels."""
        factor, config = self.pipe.vae_scale_factor, _config(self.module)
        return 1, config.in_channels, height // factor, width // factor

    @property
    def own_size(self) -> tuple[int, int]:
        """The (H, W) of the images that the base was trained for."""
        return self.size_of(_config(self.module), self.pipe.vae_scale_factor)

    @property
    def prediction_type(self) -> str:
        """The kind of the model output: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``."""
        scheduler = self.pipe.scheduler
        return "flow" if is_flow(scheduler) else scheduler.config.prediction_type

    # Text

    @abstractmethod
    def token_positions(self, layout: Layout) -> list[tuple[int, ...]]:
        """Return for each region the positions of its phrase among the K tokens.

        ValueError as for :func:`localctl.tokens.token_positions`.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        """Encode n texts as the pipeline encodes prompts; return n times (K, C), without padding that is masked out.

        ``arguments``: of the running call's ``encode_prompt``, which give device and settings.
        """

    def same_tokens(self, first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
        """Return pairs of the positions of a phrase's tokens in two texts, as far as they have the same tokens."""
        return list(zip(first, second, strict=False))

    def text_in_layers(self, text: Tensor) -> Tensor:
        """Return texts (n, K, C) as the cross-attention layers receive them, (n, K, C')."""
        return text

    @abstractmethod
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning of one image of ``size`` = (H, W), as the stock pipelines compute it.

        Inside ``attach``, this begins a call.
        """


Residuals = Sequence[Tensor | None]


def add_residuals(first: Residuals | None, second: Residuals | None) -> list[Any] | None:
    """Return the sum of two lists of residuals, level by level, as a new list; None means no residuals."""
    if first is None or second is None:
        return list(first or second or ()) or None
    return [b if a is None else a if b is None else a + b for a, b in zip_longest(first, second)]


def argument(arguments: tuple[tuple[Any, ...], Mapping[str, Any]], order: Sequence[str], name: str) -> Any:
    """Return an argument of a call that may be passed by position. ``order``: the names of the first arguments."""
    args, kwargs = arguments
    place = order.index(name)
    return args[place] if len(args) > place else kwargs[name]


def with_arguments(arguments: Arguments, order: Sequence[str], changed: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call with some changed, each where it was passed, by position or by name."""
    args, kwargs = list(arguments[0]), dict(arguments[1])
    for name, value in changed.items():
        if name in order and len(args) > order.index(name):
            args[order.index(name)] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def _config(module: nn.Module) -> Any:
    return module.config
