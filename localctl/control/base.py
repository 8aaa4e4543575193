"""What a control is, and what it is told at each call of the denoiser.

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


class _WhenAsked:
    """A field that is a number, or a function which is asked for the number once, when somebody reads it."""

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
    """Where one call of the denoiser stands.

    step, num_steps: the outer sampling step, 0 <= step < num_steps, of those this call of the pipeline makes (with
        image-to-image or ``denoising_end`` not all of the schedule's). Schedulers of second order call the denoiser
        twice in one step.
    timestep: what the denoiser was given. sigma: its noise level, sqrt((1 - abar) / abar), finite and above 0; may be
        given as a function, which is called when a control reads it.
    layout_of_row: for each of the R rows of the batch, the index of its layout.
    conditional: for each row, whether it carries the prompt (True) or the negative prompt (False).
    latent_size: (h, w) of the noisy latents. image_size: (H, W) in pixels.
    device, dtype: what tensors for the denoiser must have.
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
    sigma: _WhenAsked = _WhenAsked()

    @property
    def guided_rows(self) -> slice:
        """The rows that carry the prompt: pipelines put them last."""
        first = self.conditional.index(True)
        assert all(self.conditional[first:])
        return slice(first, len(self.conditional))

    @property
    def guided_layouts(self) -> tuple[int, ...]:
        """For each row that carries the prompt, the index of its layout."""
        return self.layout_of_row[self.guided_rows]

    def within(self, start: float, end: float) -> bool:
        """Whether this step lies in [start, end), as fractions of all outer steps. Windows that meet share no step."""
        return start <= self.step / self.num_steps < end

    def only(self, images: Sequence[int]) -> CallContext:
        """Return the same place for a call with nothing but the prompt rows of these images."""
        layouts = self.guided_layouts
        chosen = tuple(layouts[image] for image in images)
        return replace(self, layout_of_row=chosen, conditional=(True,) * len(chosen))


Attend = Callable[[Tensor, Sequence[int]], Tensor]


class RunDenoiser(Protocol):
    """Runs the denoiser of the present call once more, on the prompt rows of some of its images."""

    def __call__(self, latents: Tensor, images: Sequence[int], reader: BoundControl) -> AbstractContextManager[None]:
        """``latents`` (m, c, h, w), with gradients if they want them, for images number ``images``. All that steers
        the call steers this run, too; ``reader`` sees its attention and may raise :class:`EndOfRun` when it has seen
        enough. Take gradients within the context: layers under gradient checkpointing are run again for them."""


class EndOfRun(Exception):
    """Raised by the reader of a :class:`RunDenoiser` to end that run early."""


class BoundControl:
    """A control on one pipeline, for one ``attach``. Subclasses override the hooks they need.

    At each call of the denoiser, ``down_residuals``, ``block_residuals``, ``text`` and ``shift_latents`` change its
    inputs; at each attention layer for which ``attends`` says so, ``attention_bias``, ``read_attention`` and
    ``mix_attention`` are called, in this order.

    moves_latents: whether ``shift_latents`` may return a shift, which not every scheduler takes.
    takes_gradients: whether it asks for gradients through the denoiser, which not all weights let pass.
    is_reader: only reads attention and changes nothing; it is left out when another control runs the denoiser for
        itself.
    """

    moves_latents = False
    takes_gradients = False
    is_reader = False

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        """Begin a call of the pipeline; ``arguments`` are those of its ``encode_prompt``."""

    def shift_latents(self, context: CallContext, latents: Tensor, run: RunDenoiser) -> Tensor | None:
        """Return what to add to the noisy latents (n, c, h, w) before this step, one row per image, float32; or None.
        A hook on the latents, for controls whose ``moves_latents`` is set.

        ``latents`` are what the denoiser is given (c channels of latents only), z = sqrt(abar) z0 + sqrt(1 - abar) eps,
        whatever the scheduler's own scale; the shift is of the same scale."""
        return None

    def down_residuals(self, context: CallContext) -> list[Tensor] | None:
        """Return what to add within the down blocks: tensors (R, c, h, w), one per block, finest first; or None to
        leave this call alone. A hook on the inputs of the denoiser, which may write to them: make new ones."""
        return None

    def block_residuals(self, context: CallContext, inputs: DenoiserInputs) -> BlockResiduals | None:
        """Return what to add to the skip connections and the middle block, or None. A hook on the inputs of the
        denoiser; ``inputs`` are the call's own, before any control changes text or latents."""
        return None

    def text(self, context: CallContext, text: Tensor) -> Tensor | None:
        """Return another text context (R, K, C) in place of ``text``, which must not be written to; or None. A hook on
        the inputs of the denoiser: biases are then computed from the new text."""
        return None

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        """Whether this control wants the hooks below to be called at ``layer`` in this call of the denoiser."""
        return False

    def max_queries(self, layer: AttentionLayer, scores: Scores) -> int:
        """How many queries of this layer the next two hooks can be given at once; a limit of memory."""
        return layer.cells

    def attention_bias(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice
    ) -> Tensor | None:
        """Return what to add to the scores of these queries, for the n rows that carry the prompt: (n, 1 or H, q, K);
        or None, for all queries of the layer, to leave the layer exactly as it is. It sees the scores before any
        bias."""
        return None

    def read_attention(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice, bias: Tensor | None
    ) -> None:
        """Look at the scores of these queries and the sum of all controls' biases; change neither."""

    def mix_attention(
        self, context: CallContext, layer: AttentionLayer, output: Tensor, attend: Attend
    ) -> Tensor | None:
        """At cross-attention: another output (R, Q, C) in place of ``output``, or None. ``attend(text, rows)`` runs the
        layer again for these rows of the batch with other texts (r, K, C), without any bias: (r, Q, C)."""
        return None


class Control(Serializable, ABC):
    """Anything that steers or reads the frozen denoiser while sampling: a dataclass of settings, without the state of a
    call, to be saved and loaded as JSON."""

    @abstractmethod
    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        """Prepare for this pipeline and these layouts. ValueError when they do not fit together."""


def check_window(start: float, end: float) -> None:
    """ValueError unless 0 <= start < end <= 1."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"A control needs 0 <= start < end <= 1 (fractions of the steps), not {start} and {end}.")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of those known."""
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(known)}.")


def check_strength(name: str, value: float) -> None:
    """ValueError unless ``value`` is a number that is finite in float32, too."""
    if not isinstance(value, (int, float)) or not torch.isfinite(torch.tensor(float(value))):
        raise ValueError(f"The {name} of a control is a finite number, not {value!r} (of float32, up to 3.4e38).")


__getattr__ = moved_names(
    __name__,
    {"UNetInputs": "localctl.denoisers.base:DenoiserInputs", "RunUNet": f"{__name__}:RunDenoiser"},
)
