"""The base classes of controls, and the context that a control receives at each call of the denoiser.

A :class:`Control` describes what the user wants and keeps no state. ``attach`` binds it to one pipeline and its
layouts; the resulting :class:`BoundControl` holds what is computed once per attach and implements the hooks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.serialization import Serializable
from localctl.denoisers.base import AttentionLayer, BlockResiduals, DenoiserInputs
from localctl.layout import Layout
from localctl.lazy import moved_names


class _LazyNumber:
    """A field set to a number, or to a function that is called once, on first access, to compute the number."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> float:
        if instance is None:
            return math.nan  # the field's default
        value = vars(instance)[self.name]
        if callable(value):
            value = vars(instance)[self.name] = value()
        return value

    def __set__(self, instance: Any, value: float | Callable[[], float]) -> None:
        vars(instance)[self.name] = value


@dataclass(frozen=True)
class CallContext:
    """One call of the denoiser: its place on the schedule, its batch and its sizes.

    step, num_steps: the outer sampling step, 0 <= step < num_steps, counted over the steps of this call of the pipeline
        (fewer than the schedule has with image-to-image or ``denoising_end``). Second-order schedulers call the
        denoiser twice in one step.
    timestep: the timestep passed to the denoiser. sigma: its noise level relative to the image, sqrt((1 - abar) /
        abar), or s / (1 - s) with flow matching; finite and above 0. May be set to a function, which is called when a
        control first reads it. flow: whether the base is one of flow matching.
    layout_of_row: for each of the R rows of the batch, the index of its layout.
    conditional: for each row, whether it carries the prompt (True) or the negative prompt (False). has_negative:
        whether the running call of the pipeline has a negative prompt, in this call of the denoiser or in another.
    again: whether this call repeats another of its step with blocks left out (SD3's skip-layer guidance).
    latent_size: (h, w) of the noisy latents. image_size: (H, W) in pixels.
    device, dtype: required of tensors that are passed to the denoiser.
    """

    step: int
    num_steps: int
    timestep: float
    layout_of_row: tuple[int, ...]
    conditional: tuple[bool, ...]
    latent_size: tuple[int, int]
    image_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    sigma: _LazyNumber = _LazyNumber()
    flow: bool = False
    has_negative: bool = True
    again: bool = False

    @property
    def guided_rows(self) -> slice:
        """The rows of the batch that carry the prompt: the last ones, or the first ones (Z-Image's). Empty in a call
        without such rows."""
        first = self.conditional.index(True) if any(self.conditional) else len(self.conditional)
        last = first + sum(self.conditional)
        assert all(self.conditional[first:last])
        return slice(first, last)

    @property
    def guided_layouts(self) -> tuple[int, ...]:
        """For each row that carries the prompt, the index of its layout."""
        return self.layout_of_row[self.guided_rows]

    @property
    def growth(self) -> float:
        """(x / z)^2, with z the denoiser's input and x = z0 + sigma eps, the same with the image at full strength."""
        return (1 + float(self.sigma)) ** 2 if self.flow else 1 + float(self.sigma) ** 2

    def within(self, start: float, end: float) -> bool:
        """Return whether this step lies in [start, end), fractions of all outer steps.

        Adjacent windows share no step.
        """
        return start <= self.step / self.num_steps < end

    def only(self, images: Sequence[int]) -> CallContext:
        """Return the context of the same call restricted to the prompt rows of these images."""
        layouts = self.guided_layouts
        chosen = tuple(layouts[image] for image in images)
        return replace(self, layout_of_row=chosen, conditional=(True,) * len(chosen))


Attend = Callable[[Tensor, Sequence[int] | Tensor], Tensor]


@dataclass(frozen=True)
class Factors:
    """A modulation of the scores s of a self-attention layer that is computed without any matrix of all pairs of cells.

    The scores become ``scale * s + loose_i * loose_j * again_i * s + left @ right^T``, apart from a term that is the
    same for all keys of a query, which the softmax ignores.

    Args:
        scale, again: (n, 1 or H, Q, 1). loose: (n, 1, Q, 1), 1 for some cells and else 0; None: nothing is added again.
        left: (n, H, Q, p). right: (n, 1, Q, p).
    """

    scale: Tensor
    left: Tensor
    right: Tensor
    again: Tensor | None = None
    loose: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive pairs of a :class:`Mixture`, g of them, and their m cells, as indices into all rows' cells.

    pairs: the pairs. into, bases: (g * m,), row * Q + cell of each. share: (g * m, 1).
    """

    pairs: slice
    into: Tensor
    bases: Tensor
    share: Tensor


@dataclass(frozen=True)
class Mixture:
    """Other texts to mix into the output of a cross-attention layer.

    For each pair p of a row and a text, the output of ``rows[p]`` grows by ``share[p]`` times the difference of its
    attention to ``texts[p]`` and the attention of row ``bases[p]`` to its own text.

    Args:
        texts: (pairs, K, C); the same tensor as long as the texts are the same. rows, bases: (pairs,), int64. share:
            (pairs, Q, 1).
        parts: all pairs, with the cells where the share may differ from 0.
        mask: (pairs, 1, K), a bias that hides what shorter texts are filled up with; None for texts of one length.
    """

    texts: Tensor
    rows: Tensor
    bases: Tensor
    share: Tensor
    parts: tuple[Part, ...]
    mask: Tensor | None = None


class RunDenoiser(Protocol):
    """Runs the denoiser of the current call once more, on the prompt rows of some of its images."""

    def __call__(self, latents: Tensor, images: Sequence[int], reader: BoundControl) -> AbstractContextManager[None]:
        """Run the denoiser on ``latents`` (m, c, h, w), which may require gradients, for the images ``images``.

        All controls of the call steer this run as well. ``reader`` reads its attention and may raise
        :class:`EndOfRun` to end it early. Compute gradients inside the context: gradient checkpointing runs layers
        again in the backward pass.
        """


class EndOfRun(Exception):
    """Raised by the reader of a :class:`RunDenoiser` to end that run early."""


class BoundControl:
    """A control on one pipeline, for one ``attach``. Subclasses override the hooks they need.

    At each call of the denoiser, ``down_residuals``, ``block_residuals``, ``image_embeds``, ``text`` and
    ``shift_latents`` change its inputs. At each attention layer for which ``attends`` returns True, ``image_masks``,
    ``attention_factors`` or ``attention_bias``, ``read_attention``, ``mixture`` and ``mix_attention`` are called, in
    this order.

    moves_latents: whether ``shift_latents`` may return a shift, which not every scheduler supports.
    takes_gradients: whether it needs gradients through the denoiser, which not all kinds of weights support.
    is_reader: whether it only reads attention and changes nothing; such a control is left out when another control
        runs the denoiser for itself.
    guidance_scale: how much of what ``down_residuals`` changes in the model output of the prompt's rows is taken,
        as a guidance scale beside the pipeline's own; None: what it changes is the model output as it is. Its residuals
        are 0 on the rows of the negative prompt.
    """

    moves_latents = False
    takes_gradients = False
    is_reader = False
    guidance_scale: float | None = None

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        """Begin a call of the pipeline. ``arguments``: the arguments of its ``encode_prompt``, by name."""

    def shift_latents(self, context: CallContext, latents: Tensor, run: RunDenoiser) -> Tensor | None:
        """Return a shift (n, c, h, w) float32 of the noisy latents before this step, one row per image; or None.

        A hook on the latents, for controls with ``moves_latents`` set. ``latents`` are the denoiser's input (the c
        latent channels only), z = sqrt(abar) z0 + sqrt(1 - abar) eps, whatever the scheduler's own scale, or z = (1 -
        s) z0 + s eps with flow matching; the shift has the same scale.
        """
        return None

    def down_residuals(self, context: CallContext) -> Sequence[Tensor | None] | None:
        """Return residuals to add within the down blocks: tensors (R, c, h, w), one per block, finest first; or None.

        For a transformer, after its blocks, in the order they run, and to the tokens of the image. None within the list
        leaves a block as it is.

        A hook on the denoiser's inputs. The denoiser may write to these tensors: return new ones at each call.
        """
        return None

    def block_residuals(self, context: CallContext, inputs: DenoiserInputs) -> BlockResiduals | None:
        """Return residuals to add to the skip connections and the middle block, or None.

        A hook on the denoiser's inputs; ``inputs`` are those of the call before any control changes text or latents.
        """
        return None

    def image_embeds(self, context: CallContext) -> list[Tensor] | None:
        """Return the image embeddings (R, n, ...) of n images for each of the base's IP-Adapters; or None.

        A hook on the denoiser's inputs; one control of a call may give them.
        """
        return None

    def image_masks(self, context: CallContext, layer: AttentionLayer) -> list[Tensor] | None:
        """Return the share of each of the n images in the cells of this layer, (R, n, 1, Q), for each of the base's
        IP-Adapters; or None. Called at cross-attention."""
        return None

    def text(self, context: CallContext, text: Tensor) -> Tensor | None:
        """Return prompt embeddings (R, K, C) that replace ``text``, which must not be modified; or None.

        A hook on the denoiser's inputs: biases are then computed from the new embeddings.
        """
        return None

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        """Return whether the hooks below are to be called at ``layer`` in this call of the denoiser."""
        return False

    def max_queries(self, layer: AttentionLayer, scores: Scores) -> int:
        """Return how many queries of this layer the next two hooks may process at once, which bounds memory."""
        return layer.cells

    def attention_factors(self, context: CallContext, layer: AttentionLayer, scores: Scores) -> Factors | None:
        """Return the same as :meth:`attention_bias` for the whole layer in a form without a matrix of all pairs; or
        None.

        Called at self-attention that the processor computes itself; ``attention_bias`` is then called only after None.
        """
        return None

    def attention_bias(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice
    ) -> Tensor | None:
        """Return a bias (n, 1 or H, q, K) on the scores of these queries, for the n rows that carry the prompt.

        None leaves the layer exactly as it is; it must then be returned for all queries of the layer. ``scores`` are
        those before any bias.
        """
        return None

    def read_attention(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice, bias: Tensor | None
    ) -> None:
        """Read the scores of these queries and the sum of all controls' biases; change neither."""

    def token_bias(self, context: CallContext, layer: AttentionLayer, keys: int) -> Tensor | None:
        """Return a bias (n, 1, K, K) on the scores of the text's tokens among each other, for the rows that carry the
        prompt; or None. Called at joint attention only, where ``attends`` returned True for the half of the text."""
        return None

    def mixture(self, context: CallContext, layer: AttentionLayer) -> Mixture | None:
        """Return other texts to mix into the layer's output; or None. Called at cross-attention only."""
        return None

    def mix_attention(
        self, context: CallContext, layer: AttentionLayer, output: Tensor, attend: Attend
    ) -> Tensor | None:
        """Return an output (R, Q, C) that replaces ``output``, or None. Called at cross-attention only.

        ``attend(text, rows)`` runs the layer again for these rows of the batch with other prompt embeddings (r, K, C)
        and without any bias, and returns (r, Q, C).
        """
        return None


class Control(Serializable, ABC):
    """Anything that steers or reads the frozen denoiser while sampling.

    A dataclass of settings that can be saved and loaded as JSON; it holds no state of a call.
    """

    @abstractmethod
    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        """Return the control bound to this pipeline and these layouts. ValueError when they do not fit together."""


def check_window(start: float, end: float) -> None:
    """Raise a ValueError unless 0 <= start < end <= 1."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"A control needs 0 <= start < end <= 1 (fractions of the steps), not {start} and {end}.")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(known)}.")


def check_strength(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a number that is finite in float32."""
    if not isinstance(value, (int, float)) or not torch.isfinite(torch.tensor(float(value))):
        raise ValueError(f"The {name} of a control must be a finite number, not {value!r} (float32 ends at 3.4e38).")


__getattr__ = moved_names(
    __name__, {"UNetInputs": "localctl.denoisers.base:DenoiserInputs", "RunUNet": f"{__name__}:RunDenoiser"}
)
