"""The attention of one layer in one call: its projections, its scores as far as controls need them, and its output.

Symbols in shapes: R rows of the batch, n of them with the prompt, H heads, Q queries (cells of the image), K keys
(tokens or cells), d width of a head, C = H * d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from localctl.lazy import moved_names

__getattr__ = moved_names(__name__, {"Site": "localctl.denoisers.base:AttentionLayer"})


class Scores:
    """The scores of one layer in one call, computed lazily.

    scores = scale * q k^T, in float32, from the global prompt embeddings passed to the denoiser, before any bias.
    ``mask`` is the attention mask that the denoiser itself set, which is rare: (R, 1 or Q, K), or None. ``heads``: the
    projections of all rows, if the layer's own attention uses them as well.
    """

    def __init__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        guided: slice,
        heads: Heads | None = None,
    ) -> None:
        self.attn = attn
        self.hidden_states = hidden_states  # (R,Q,C)
        self.source = hidden_states if text is None else text  # (R,K,C')
        self.mask = mask
        self.guided = guided
        self.heads = heads

    @property
    def rows(self) -> int:
        """The number n of rows that carry the prompt."""
        return self.guided.stop - self.guided.start

    @property
    def keys(self) -> int:
        return self.source.shape[1]

    @property
    def batch(self) -> int:
        """The number R of all rows."""
        return self.hidden_states.shape[0]

    @property
    def number(self) -> int:
        """The number H of heads."""
        return self.attn.heads

    @property
    def scale(self) -> float:
        """The factor of q k^T."""
        return self.attn.scale

    @cached_property
    def query(self) -> Tensor:
        """The projected queries (n, H, Q, d) of the rows that carry the prompt."""
        return self._query(self.guided)

    @cached_property
    def key(self) -> Tensor:
        """The projected keys (n, H, K, d) of the rows that carry the prompt."""
        return self._key(self.guided)

    def _query(self, rows: slice) -> Tensor:
        return project_query(self.attn, self.hidden_states[rows]) if self.heads is None else self.heads.query[rows]

    def _key(self, rows: slice) -> Tensor:
        if self.heads is not None:
            return self.heads.key[rows]
        return _key(self.attn, _normed(self.attn, self.source[rows], self.source is not self.hidden_states))

    @cached_property
    def _guided(self) -> tuple[Tensor, Tensor]:
        return self.query, self.key.float().transpose(-1, -2) * self.scale

    def block(self, queries: slice) -> Tensor:
        """Return the scores (n, H, q, K) float32 of these queries in the rows that carry the prompt.

        The tensor is a new one, so the caller may modify it.
        """
        query, key = self._guided
        return query[:, :, queries].float() @ key

    @cached_property
    def hidden(self) -> Tensor | None:
        """Which keys are padding that the denoiser's own mask hides, (R, K) bool; None if there is no such key."""
        if self.mask is None or self.mask.shape[1] != 1:
            return None
        rows = self.mask.reshape(self.batch, -1, self.mask.shape[-1])[:, 0] <= _HIDDEN
        return rows if bool(rows.any()) else None

    def probabilities(self, queries: slice, bias: Tensor | None) -> Tensor:
        """Return the attention (n, H, q, K) float32 of these queries to the keys, under the denoiser's own mask and
        ``bias``."""
        block = self.block(queries)
        if self.mask is not None:
            mask = self.mask.reshape(self.batch, -1, *self.mask.shape[-2:])[self.guided].float()
            block = block + (mask if mask.shape[2] == 1 else mask[:, :, queries])
        return (block if bias is None else block + bias).softmax(dim=-1)

    @cached_property
    def std(self) -> Tensor:
        """The unbiased standard deviation (n,) of each prompt row's unmasked scores, over heads and entries."""
        if self.hidden is not None:
            rows = zip(self.query.float(), self.key.float(), self.hidden[self.guided], strict=True)
            return self.scale * torch.cat([_std((q @ k[:, ~off].mT).flatten()[None]) for q, k, off in rows])
        return self.scale * _std((self.query.float() @ self.key.float().mT).flatten(1))

    @cached_property
    def global_std(self) -> Tensor:
        """One standard deviation () over all rows, heads and entries, as published; of the masked scores if masked."""
        query, key = self._query(slice(None)), self._key(slice(None))
        scores = query.float() @ (key.float() * self.scale).mT  # (R,H,Q,K)
        if self.hidden is not None:  # padding is no part of the prompts
            return _std(scores[~self.hidden[:, None, None].expand_as(scores)][None])[0]
        if self.mask is not None:
            scores = scores + self.mask.float().reshape(self.mask.shape[0], -1, *self.mask.shape[-2:])
        return _std(scores.flatten()[None])[0]


HIDE = -1e4  # the bias by which diffusers hides keys


def padded(texts: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Return texts (n_i, K_i, C) of any lengths as one tensor (n, K, C), and the bias (n, 1, K) that hides the ends of
    shorter ones, or what the ``masks`` (n_i, 1, K_i) hide; None if that is nothing."""
    longest = max(text.shape[1] for text in texts)
    hidden = []
    for text, mask in zip(texts, masks, strict=True):
        own = text.new_zeros(len(text), 1, text.shape[1]) if mask is None else mask
        hidden.append(nn.functional.pad(own, (0, longest - text.shape[1]), value=HIDE))
    filled = [nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]
    shorter = any(text.shape[1] < longest for text in texts) or any(mask is not None for mask in masks)
    return torch.cat(filled), torch.cat(hidden) if shorter else None


_HIDDEN = -1e3  # at most this: hidden


def _std(values: Tensor) -> Tensor:
    """Return the unbiased standard deviation (n,) of each row of ``values`` (n, entries).

    ``values`` are overwritten. Two passes lose no digits to cancellation; torch.std takes twice as long on a CPU.
    """
    values.sub_(values.mean(dim=1, keepdim=True))
    return torch.linalg.vector_norm(values, dim=1) / math.sqrt(max(1, values.shape[1] - 1))


@dataclass(frozen=True)
class Heads:
    """Queries (R,H,Q,d), keys and values (R,H,K,d) of all rows, and attention as ``AttnProcessor2_0`` computes it.

    Controls, which would otherwise project once more, and the layer share them.
    """

    attn: Attention
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, attn: Attention, processor: Any, hidden_states: Tensor, text: Tensor | None) -> Heads | None:
        """Project; or return None for another processor, or a layer with more than projections and attention."""
        plain = attn.spatial_norm is None and attn.group_norm is None and hidden_states.ndim == 3
        if type(processor) is not AttnProcessor2_0 or not plain:
            return None
        source = hidden_states if text is None else text
        return cls(attn, project_query(attn, hidden_states), *project_text(attn, source, text is not None))

    def output(self, core: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the layer's output (R, Q, C) for what attention gives, ``core`` (R, Q, C)."""
        linear, dropout = self.attn.to_out
        output = dropout(linear(core))
        if self.attn.residual_connection:
            output = output + hidden_states
        return output if self.attn.rescale_output_factor == 1 else output / self.attn.rescale_output_factor


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return softmax(scale * q k^T + bias) v, (r, H, Q, d).

    ``bias``: (r, 1 or H, Q, K), or None. ``scale``: by default 1 / sqrt(width of queries).
    """
    if bias is not None:
        if query.dtype == torch.float16:  # which would overflow at a large noise level, and inf - inf is NaN
            most = torch.finfo(query.dtype).max / 2
            bias = bias.clamp(-most, most)
        bias = bias.to(query.dtype).expand(-1, query.shape[1], -1, -1)  # without a copy for every head
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def merge(core: Tensor) -> Tensor:
    """Return (r,H,Q,d) as (r,Q,C)."""
    return core.transpose(1, 2).flatten(2)


def project_query(attn: Attention, hidden_states: Tensor) -> Tensor:
    """Return the queries (r, H, Q, d) of ``hidden_states`` (r, Q, C)."""
    query = _split(attn, attn.to_q(hidden_states))
    return query if attn.norm_q is None else attn.norm_q(query)


def project_text(attn: Attention, source: Tensor, cross: bool = True) -> tuple[Tensor, Tensor]:
    """Return keys and values (r, H, K, d) of ``source`` (r, K, C'): a text if ``cross``, else the layer's own input."""
    source = _normed(attn, source, cross)
    return _key(attn, source), _split(attn, attn.to_v(source))


def _normed(attn: Attention, source: Tensor, cross: bool) -> Tensor:
    return attn.norm_encoder_hidden_states(source) if cross and attn.norm_cross else source


def _key(attn: Attention, source: Tensor) -> Tensor:
    key = _split(attn, attn.to_k(source))
    return key if attn.norm_k is None else attn.norm_k(key)


def _split(attn: Attention, tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
