"""Prompt embeddings, as text encoders return them and as denoisers take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localctl.devices import send


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

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """Return the embeddings on ``device``, which fetches them without waiting, and of ``dtype``."""
        states, pooled = self.states, self.pooled
        return PromptEmbeds(send(states, device).to(dtype), None if pooled is None else send(pooled, device).to(dtype))

    def pin_memory(self) -> PromptEmbeds:
        """Return the embeddings in memory from which a CUDA device fetches without waiting."""
        return PromptEmbeds(self.states.pin_memory(), None if self.pooled is None else self.pooled.pin_memory())

    def clone(self) -> PromptEmbeds:
        """Return a copy in memory of its own."""
        return PromptEmbeds(self.states.clone(), None if self.pooled is None else self.pooled.clone())

    @classmethod
    def join(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Concatenate several prompt embeddings to one batch."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        assert len(pooled) in (0, len(parts))
        return cls(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)
