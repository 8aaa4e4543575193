"""Controls in code compiled by ``torch.compile``: steered attention is one operator there, or the code runs eagerly.

A graph holds only the operator and a tensor that names the layer. What a control does, its step and its layout are
therefore no part of the graph, which is compiled once and serves all of them.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Steered(Protocol):
    """An attention processor that the operator calls."""

    def run_compiled(self, hidden_states: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return a new tensor of the shape and dtype of ``hidden_states`` (R, Q, C)."""


# The operator takes only tensors, so it finds the processor by a number, as long as the processor lives.
_PROCESSORS: weakref.WeakValueDictionary[int, Steered] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def handle_of(processor: Steered) -> Tensor:
    """Return the number of a processor for :func:`operator`: () int64 on the CPU, an input of the graphs."""
    number = next(_NUMBERS)
    _PROCESSORS[number] = processor
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


@functools.cache
def operator() -> Any:
    """Register the operator on first use and return it."""
    # A CUDA graph would replay the kernels of one step, so it must leave the operator out. Without the tag, its input
    # on the CPU has the same effect.
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    options: dict[str, Any] = {} if tag is None else {"tags": [tag]}

    @torch.library.custom_op(
        "localctl::steered_attention",
        mutates_args=(),
        schema="(Tensor hidden_states, Tensor? text, Tensor? mask, Tensor handle) -> Tensor",
        **options,
    )
    def steered_attention(hidden_states: Tensor, text: Tensor | None, mask: Tensor | None, handle: Tensor) -> Tensor:
        return _PROCESSORS[int(handle)].run_compiled(hidden_states, text, mask)

    @steered_attention.register_fake
    def _(hidden_states: Tensor, text: Tensor | None, mask: Tensor | None, handle: Tensor) -> Tensor:
        return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)

    return torch.ops.localctl.steered_attention.default


def is_compiled(module: nn.Module) -> bool:
    """Return whether the module or a part of it is compiled."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        vars(part).get("_compiled_call_impl") is not None
        or hasattr(part.forward, "_torchdynamo_orig_callable")
        or isinstance(part, torch._dynamo.OptimizedModule)
        for part in module.modules()
    )


class Shared:
    """A setting of torch for the whole process, as a context that has users.

    They are counted, over all threads and in any order; the last one to leave restores the setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock, self._users = threading.Lock(), 0
        self._context: AbstractContextManager[Any] = nullcontext()

    def enter(self) -> None:
        """Count one more user; the first one changes the setting."""
        with self._lock:
            if not self._users:
                self._context = self._make()
                self._context.__enter__()
            self._users += 1

    def leave(self) -> None:
        """Count one user less; the last one restores the setting."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._context.__exit__(None, None, None)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Be a user for a while, if torch's compiler is loaded; else nothing is compiled."""
        if "torch._dynamo" not in sys.modules:
            yield
            return
        self.enter()
        try:
            yield
        finally:
            self.leave()


def _more_graphs() -> AbstractContextManager[Any]:
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the older name
    return config.patch(**{name: max(_GRAPHS, getattr(config, name))})


# Blocks of one class share their graphs, up to 8 by default: too few for all shapes of blocks, steered and not.
_GRAPHS = 64
MORE_GRAPHS = Shared(_more_graphs)
EAGER_MODE = Shared(lambda: torch.compiler.set_stance("force_eager"))
