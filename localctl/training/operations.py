"""Count the FLOPs of operations, and the bytes of their results while they are in use, on the meta device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@torch.no_grad()
def count_flops(run: Callable[[], Any]) -> float:
    """Return the FLOPs of ``run`` on the meta device, without gradients."""
    return count_operations(run)[0]


def count_operations(run: Callable[[], Any]) -> tuple[float, int]:
    """Return the FLOPs of ``run`` on the meta device, and its peak of bytes in use."""
    with OperationWatch() as watch, _fused_attention(watch):
        run()
    return float(watch.flops), watch.peak


class OperationWatch(TorchDispatchMode):
    """Counts the FLOPs of every operation with torch's table, and the bytes of its results until they are freed.

    (torch's FlopCounterMode also tracks every module, which takes longer; its MemTracker is private.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if not func.is_view:  # a view uses no new memory
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self._keep(tensor.untyped_storage())
        return result

    def add_products(self, query: Tensor, key: Tensor, products: int) -> None:
        """Count ``products`` matrix products of the size of query times key."""
        self.flops += products * 2 * math.prod(query.shape) * key.shape[-2]

    def _keep(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def _fused_attention(watch: OperationWatch) -> Iterator[None]:
    """Within, attention on the meta device stores what a fused kernel stores; torch's own would store the scores. A
    function mode cannot do this: it is off in backward, where gradient checkpointing recomputes attention."""
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return real(query, key, value, *args, **options)
        return _Attention.apply(query, key, value, watch)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    """Fused attention without values. Backward counts the products for the required gradients, but not those that a
    kernel recomputes to save memory."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, watch: OperationWatch) -> Tensor:
        watch.add_products(query, key, 2)
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        ctx.watch = watch
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        through_scores = wanted[0] or wanted[1]
        ctx.watch.add_products(query, key, int(through_scores) + sum(wanted))
        made = [torch.empty_like(t) if want else None for t, want in zip((query, key, value), wanted, strict=True)]
        return (*made, None)
