"""What a control is, and what it is told at each call of the U-Net.

A :class:`Control` describes what the user wants and keeps no state. ``attach`` binds it to one pipeline and its
layouts; the resulting :class:`BoundControl` holds what is computed once per attach and implements the hooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.layout import Layout


@dataclass(frozen=True)
class CallContext:
    """Where one call of the U-Net stands.

    step, num_steps: the outer sampling step, 0 <= step < num_steps. Schedulers of second order call the U-Net twice in
        one step.
    timestep: what the U-Net was given.
    layout_of_row: for each of the R rows of the batch, the index of its layout.
    conditional: for each row, whether it carries the prompt (True) or the negative prompt (False).
    latent_size: (h, w) of the noisy latents. image_size: (H, W) in pixels.
    device, dtype: what tensors for the U-Net must have.
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

    def within(self, start: float, end: float) -> bool:
        """Whether this step lies in [start, end), as fractions of all outer steps. Windows that meet share no step."""
        return start <= self.step / self.num_steps < end


class BoundControl:
    """A control on one pipeline, for one ``attach``. Subclasses override the hooks they need."""

    def down_residuals(self, context: CallContext) -> list[Tensor] | None:
        """Hook on the inputs of the U-Net: tensors (R, c, h, w) added within its down blocks, one per block, finest
        first; or None to leave this call alone. They must be the caller's to keep: the U-Net may write to them."""
        return None


class Control(ABC):
    """Anything that steers the frozen U-Net while sampling."""

    @abstractmethod
    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        """Prepare for this pipeline and these layouts. ValueError when they do not fit together."""


def check_window(start: float, end: float) -> None:
    """ValueError unless 0 <= start < end <= 1."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"A control needs 0 <= start < end <= 1 (fractions of the steps), not {start} and {end}.")


def add_residuals(first: Sequence[Tensor] | None, second: Sequence[Tensor] | None) -> list[Tensor] | None:
    """The sum of two lists of residuals, level by level; None counts as nothing. Returns a new list."""
    if first is None or second is None:
        return list(first or second or ()) or None
    return [b if a is None else a if b is None else a + b for a, b in zip_longest(first, second)]
