"""The scores of an attention layer, computed only as far as controls need them.

Symbols in shapes: R rows of the batch, n of them with the prompt, H heads, Q queries (cells of the image), K keys
(tokens or cells), d width of a head.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from diffusers.models.attention_processor import Attention
from torch import Tensor

from localctl.lazy import moved_names

__getattr__ = moved_names(__name__, {"Site": "localctl.denoisers.base:AttentionLayer"})


class Moments(NamedTuple):
    """Moments of the vectors of each row and head.

    mean: (r,H,1,d). spread: the sum of the outer products of the deviations from the mean, (r,H,d,d). number: the count
    of vectors.
    """

    mean: Tensor
    spread: Tensor
    number: int


class Scores:
    """The scores of one layer in one call, computed lazily.

    scores = scale * q k^T, in float32, from the global prompt embeddings passed to the denoiser, before any bias.
    ``mask`` is the attention mask that the denoiser itself set, which is rare: (R, 1 or Q, K), or None.
    """

    def __init__(
        self, attn: Attention, hidden_states: Tensor, text: Tensor | None, mask: Tensor | None, guided: slice
    ) -> None:
        self.attn = attn
        self.hidden_states = hidden_states  # (R,Q,C)
        self.source = hidden_states if text is None else text  # (R,K,C')
        self.mask = mask
        self.guided = guided

    @property
    def rows(self) -> int:
        """The number n of rows that carry the prompt."""
        return self.guided.stop - self.guided.start

    @property
    def keys(self) -> int:
        return self.source.shape[1]

    @cached_property
    def query(self) -> Tensor:
        """The projected queries (n, H, Q, d) of the rows that carry the prompt."""
        return self._query(self.guided)

    @cached_property
    def key(self) -> Tensor:
        """The projected keys (n, H, K, d) of the rows that carry the prompt."""
        return self._key(self.guided)

    def _query(self, rows: slice) -> Tensor:
        query = self._heads(self.attn.to_q(self.hidden_states[rows]))
        return query if self.attn.norm_q is None else self.attn.norm_q(query)

    def _key(self, rows: slice) -> Tensor:
        source = self.source[rows]
        if self.attn.norm_cross and self.source is not self.hidden_states:
            source = self.attn.norm_encoder_hidden_states(source)
        key = self._heads(self.attn.to_k(source))
        return key if self.attn.norm_k is None else self.attn.norm_k(key)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    @cached_property
    def _guided(self) -> tuple[Tensor, Tensor]:
        return self.query, self.key.float().transpose(-1, -2) * self.attn.scale

    def block(self, queries: slice) -> Tensor:
        """Return the scores (n, H, q, K) float32 of these queries in the rows that carry the prompt.

        The tensor is a new one, so the caller may modify it.
        """
        query, key = self._guided
        return query[:, :, queries].float() @ key

    @cached_property
    def std(self) -> Tensor:
        """The unbiased standard deviation (n,) of each prompt row's unmasked scores, over heads and entries.

        With q = mean(q) + q', k = mean(k) + k', each head's scores are the sum of four parts that are orthogonal over
        the entries. The sum of their squares therefore needs only the moments of q and k, and nothing cancels.
        """
        squares, means, count = self._moments(_moments(self.query), self.key_moments)
        spread = count * (means - means.mean(dim=1, keepdim=True)) ** 2  # (n,H)
        return ((squares + spread).sum(dim=1) / (count * means.shape[1] - 1)).sqrt()

    @cached_property
    def global_std(self) -> Tensor:
        """One standard deviation () over all rows, heads and entries, as published; of the masked scores if masked."""
        query, key = self._query(slice(None)), self._key(slice(None))
        if self.mask is not None:
            scores = query.float() @ (key.float() * self.attn.scale).transpose(-1, -2)  # (R,H,Q,K)
            return (scores + self.mask.float().reshape(self.mask.shape[0], -1, *self.mask.shape[-2:])).std()
        squares, means, count = self._moments(_moments(query), _moments(key))
        spread = count * (means - means.mean()) ** 2
        return ((squares + spread).sum() / (count * means.numel() - 1)).sqrt()

    @cached_property
    def key_moments(self) -> Moments:
        """The moments of :attr:`key`. May be set to those of another call with the same prompt embeddings."""
        return _moments(self.key)

    def _moments(self, query: Moments, key: Moments) -> tuple[Tensor, Tensor, int]:
        """Return, per row and head, the sum of squared deviations (r,H), the mean (r,H), and the entries per head."""
        q, k = query.mean, key.mean  # (r,H,1,d)
        of_queries = (k @ query.spread @ k.transpose(-1, -2))[..., 0, 0] * key.number
        of_keys = (q @ key.spread @ q.transpose(-1, -2))[..., 0, 0] * query.number
        squares = of_queries + of_keys + (query.spread * key.spread).sum(dim=(2, 3))
        scale = self.attn.scale
        return squares * scale**2, (q * k).sum(dim=(2, 3)) * scale, query.number * key.number


def _moments(vectors: Tensor) -> Moments:
    """Return the moments of vectors (r,H,count,d)."""
    vectors = vectors.float()
    mean = vectors.mean(dim=2, keepdim=True)
    deviations = vectors - mean  # squares about zero would lose digits to cancellation
    return Moments(mean, deviations.transpose(-1, -2) @ deviations, vectors.shape[2])
