"""Joint attention, whose queries and keys are image and text at once, and processors that dispatch it to a backend, by
diffusers' ``dispatch_attention_fn``: those of FLUX, Qwen-Image and Z-Image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

StockAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # of query, key, value and mask
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, StockAttention], Tensor]
_DISPATCH = "dispatch_attention_fn"
# Backends that take a bias; flash, sage, aiter and the like raise an error, or know masks of whole keys only.
_TAKE_BIAS = ("native", "_native_cudnn", "_native_efficient", "_native_math", "_native_npu", "flex", "xformers")


@dataclass(frozen=True)
class Joint:
    """How a joint attention layer, whose queries and keys are image and text at once, arranges its sequence.

    run: computes the layer, ``run(processor, attend, attn, *args, **kwargs)``, as its own processor does for these
        arguments, but with ``attend(query, key, value, mask, stock)`` in place of its attention; all (R, H, S, d), see
        :meth:`localctl.control.joint.JointProcessor.attend`. ValueError for a processor that it does not know.
    text_first: whether the text comes before the image. multiple: the image's part is filled up to a multiple of this.
    """

    run: Callable[..., Any]
    text_first: bool
    multiple: int = 1

    def places(self, cells: int, total: int) -> tuple[slice, slice]:
        """Return the places of the image's cells and of the text's tokens in a sequence of ``total`` entries."""
        if self.text_first:
            return slice(total - cells, total), slice(0, total - cells)
        return slice(0, cells), slice(min(cells + -cells % self.multiple, total), total)


def check_dispatch(attn: Any, name: str) -> None:
    """Raise a ValueError unless the processor of the layer ``attn`` dispatches attention to a backend that takes a
    bias. ``name``: the subject of the sentence."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    processor = attn.processor
    code = getattr(type(processor).__call__, "__code__", None)
    if code is None or _DISPATCH not in code.co_names:
        raise ValueError(
            f"{name} has a {type(processor).__name__}, which takes no attention bias from controls; load the base "
            "without it."
        )
    backend = getattr(processor, "_attention_backend", None) or _AttentionBackendRegistry.get_active_backend()[0]
    if str(getattr(backend, "value", backend)) not in _TAKE_BIAS:
        raise ValueError(
            f"{name} computes attention by the backend {getattr(backend, 'value', backend)}, which takes no bias from "
            "controls; call pipe.transformer.set_attention_backend('native') first."
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(
            f"{name} has its tokens on several devices (context parallelism), where controls cannot locate regions; "
            "load the base without it."
        )


def dispatched(processor: Any, attend: Attend, attn: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the processor's own code, but with ``attend`` in place of the attention that it dispatches first.

    Further attention, as of an IP-Adapter, is left to its backend. The module of the processor stays as it is: other
    threads may use it.
    """
    call = type(processor).__call__
    dispatch = call.__globals__[_DISPATCH]
    steered = True

    def replaced(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        nonlocal steered
        if not steered:
            return dispatch(query, key, value, attn_mask=attn_mask, **options)
        steered = False

        def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            heads = (one.transpose(1, 2) for one in (query, key, value))
            return dispatch(*heads, attn_mask=None if mask is None else mask == 0, **options).transpose(1, 2)

        heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return attend(*heads, _as_bias(attn_mask, query), stock).transpose(1, 2)

    own = FunctionType(
        call.__code__, {**call.__globals__, _DISPATCH: replaced}, call.__name__, call.__defaults__, call.__closure__
    )
    return own(processor, attn, *args, **kwargs)


def _as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a mask (R, 1, 1, S), True where keys are attended to, as a bias."""
    if mask is None:
        return None
    assert mask.dtype == torch.bool, "masks from outside are refused"
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -math.inf)
