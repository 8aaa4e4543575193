"""Prompt embeddings, as text encoders return them and as denoisers take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """Prompt embeddings for the denoiser.

    states: (B, K, C) of the text encoder, or of both text encoders of SDXL concatenated. pooled: (B, P) of SDXL's
    second text encoder, None for other bases.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> PromptEmbeds:
        return PromptEmbeds(self.states[rows], None if self.pooled is None else self.pooled[rows])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def to(self, place: torch.device | str | torch.dtype) -> PromptEmbeds:
        """Return the embeddings on another device, or of another dtype; from pinned memory without waiting."""
        pooled = None if self.pooled is None else self.pooled.to(place, non_blocking=True)
        return PromptEmbeds(self.states.to(place, non_blocking=True), pooled)

    @classmethod
    def join(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Concatenate several prompt embeddings to one batch."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        assert len(pooled) in (0, len(parts))
        return cls(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)
