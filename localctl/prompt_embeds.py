"""Prompt embeddings, as text encoders return them and as denoisers take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from localctl.devices import send


@dataclass(frozen=True)
class PromptEmbeds:
    """Prompt embeddings for the denoiser.

    states: (B, K, C) of the text encoder, or of both text encoders of SDXL concatenated. pooled: (B, P) of the text
    encoder that gives a pooled embedding, None for other bases. lengths: how many of the K states of each row are
    tokens, where the rest is hidden from the denoiser; None where all of them are read.
    """

    states: Tensor
    pooled: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> PromptEmbeds:
        pooled, lengths = self.pooled, self.lengths
        return PromptEmbeds(
            self.states[rows], None if pooled is None else pooled[rows], None if lengths is None else lengths[rows]
        )

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return 1 for states that are tokens and 0 for others, (B, K), sent to their device without waiting."""
        assert self.lengths is not None
        places = torch.arange(self.states.shape[1])
        return send((places < torch.tensor(self.lengths)[:, None]).to(dtype), self.states.device)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """Return the embeddings on ``device``, which fetches them without waiting, and of ``dtype``."""
        states, pooled = self.states, self.pooled
        sent = None if pooled is None else send(pooled, device).to(dtype)
        return PromptEmbeds(send(states, device).to(dtype), sent, self.lengths)

    def pin_memory(self) -> PromptEmbeds:
        """Return the embeddings in memory from which a CUDA device fetches without waiting."""
        pooled = None if self.pooled is None else self.pooled.pin_memory()
        return PromptEmbeds(self.states.pin_memory(), pooled, self.lengths)

    def clone(self) -> PromptEmbeds:
        """Return a copy in memory of its own."""
        return PromptEmbeds(self.states.clone(), None if self.pooled is None else self.pooled.clone(), self.lengths)

    @classmethod
    def join(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Concatenate several prompt embeddings to one batch, shorter ones filled up to the longest with zeros."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        lengths = [length for part in parts for length in part.lengths or ()]
        assert len(pooled) in (0, len(parts))
        longest = max(part.states.shape[1] for part in parts)
        states = [part.states for part in parts]
        if any(one.shape[1] < longest for one in states):
            assert lengths
            states = [pad(one, (0, 0, 0, longest - one.shape[1])) for one in states]
        return cls(torch.cat(states), torch.cat(pooled) if pooled else None, tuple(lengths) or None)
