"""Attention under controls, computed in the layer itself: modulated scores without a matrix, and other texts mixed in.

Symbols in shapes: as in :mod:`localctl.control.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from localctl.control.attention import Heads, attend, merge
from localctl.control.base import Factors, Mixture

_ALIGNED = 8  # widths of heads that are multiples of 8 keep the fast kernels of GPUs
Biases = Callable[[slice], Tensor | None]


def steer(
    heads: Heads, guided: slice, parts: Sequence[slice], bias: Biases, factors: Factors | None
) -> tuple[Tensor, Tensor | None]:
    """Return what attention gives, (R, Q, C), and the last part's bias.

    ``bias`` and ``factors`` are for the rows ``guided``, the last ones. ``parts``: of the queries, for which ``bias``
    is computed one after the other, so that it is never held for all of them.
    """
    query, key, value = heads.query, heads.key, heads.value
    first = bias(parts[0])
    if first is None and factors is None:  # then no part has a bias
        return merge(attend(query, key, value)), None
    steered, last = [], first
    for index, part in enumerate(parts):
        last = bias(part) if index else first
        rows = (query[guided, :, part], key[guided], value[guided])
        if factors is None:
            steered.append(attend(*rows, last))
        else:
            steered.append(_with_factors(*rows, last, factors, heads.attn.scale))
    core = steered[0] if len(steered) == 1 else torch.cat(steered, dim=2)
    if guided.start:
        others = slice(0, guided.start)
        core = torch.cat([attend(query[others], key[others], value[others]), core])
    return merge(core), last


def _with_factors(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, factors: Factors, scale: float
) -> Tensor:
    """Return (n, H, Q, d): the factors become further entries of queries and keys, so that any fused kernel of
    attention computes the modulated scores."""
    count, number, cells, width = query.shape
    left, right = [query * (factors.scale * scale)], [key]
    if factors.loose is not None and factors.again is not None:
        left.append(query * (factors.loose * factors.again * scale))
        right.append(key * factors.loose)
    left.append(factors.left)
    right.append(factors.right.expand(-1, number, -1, -1))
    total = sum(tensor.shape[-1] for tensor in left)
    padded = -total % _ALIGNED
    if padded:
        zeros = query.new_zeros(()).expand(count, number, cells, padded)
        left, right = [*left, zeros], [*right, zeros]
    queries, keys = (torch.cat([tensor.to(query.dtype) for tensor in tensors], dim=-1) for tensors in (left, right))
    values = nn.functional.pad(value, (0, total + padded - width))  # the kernels want them as wide
    return attend(queries, keys, values, bias, scale=1.0)[..., :width]


def mix_in(heads: Heads, core: Tensor, mixture: Mixture, key: Tensor, value: Tensor) -> Tensor:
    """Return what attention gives, (R, Q, C), with the texts mixed in; only cells with a share attend to them.

    ``core``: what attention gives without them. ``key``, ``value``: (pairs, H, K, d), of the texts.
    """
    rows = core.flatten(0, 1)  # (R*Q,C)
    queries = heads.query.transpose(1, 2).flatten(0, 1)  # (R*Q,H,d)
    mixed = rows
    for part in mixture.parts:
        count = part.pairs.stop - part.pairs.start
        query = queries.index_select(0, part.into).unflatten(0, (count, -1)).transpose(1, 2)  # (g,H,m,d)
        mask = None if mixture.mask is None else mixture.mask[part.pairs, None]  # (g,1,1,K)
        local = merge(attend(query, key[part.pairs], value[part.pairs], mask)).flatten(0, 1)  # (g*m,C)
        change = part.share.to(core.dtype) * (local - rows.index_select(0, part.bases))
        mixed = mixed.index_add(0, part.into, change)
    return mixed.view_as(core)
