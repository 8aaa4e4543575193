"""On a CPU, the halves of a batch are computed at once, each in a thread of its own with half of the cores.

The operations of small networks are too short to be divided among cores: their threads mostly wait for each other. Two
halves share nothing but weights. The sum over both is the same in whatever order they end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from localctl.losses import LossTerms

T = TypeVar("T")
Compute = Callable[[slice, list[Tensor]], LossTerms]
_TERMS = tuple(field.name for field in fields(LossTerms))


def is_divided(rows: Tensor) -> bool:
    """Return whether a batch is computed in halves: on a CPU, by at least two threads."""
    return len(rows) > 1 and rows.device.type == "cpu" and torch.get_num_threads() > 1


def in_halves(compute: Callable[[Tensor], Tensor], rows: Tensor, most: int) -> Tensor:
    """Return ``compute(rows)``, a pure function of each row, without gradients; on a CPU in blocks of at most ``most``
    rows, and in halves where that is faster.

    All blocks have the same size, so the last two may share rows: a row's last bits may depend on the size.
    """
    if rows.device.type != "cpu":
        return compute(rows)
    halves = 2 if is_divided(rows) else 1
    size = -(-len(rows) // (halves * -(-len(rows) // (halves * most))))
    starts = range(0, len(rows), size)

    def blocks(starts: Sequence[int]) -> Tensor:
        firsts = {start: min(start, len(rows) - size) for start in starts}
        return torch.cat([compute(rows[first : first + size])[start - first :] for start, first in firsts.items()])

    if halves == 1:
        return blocks(starts)
    middle = (len(starts) + 1) // 2
    return torch.cat(_both(partial(blocks, starts[:middle]), partial(blocks, starts[middle:])))


def mean_loss(compute: Compute, features: Sequence[Tensor], *, whole: bool = False) -> tuple[Tensor, LossTerms]:
    """Return the mean of the total loss, to be differentiated with respect to ``features``, and the terms (B,).

    The terms have gradients, too, unless the batch is computed in halves.

    Args:
        compute: returns the terms of the rows in a slice, from the features of these rows: a pure function.
        features: (B,c_i,h_i,w_i) per level.
        whole: never in halves.
    """
    if whole or not is_divided(features[0]):
        terms = compute(slice(0, len(features[0])), list(features))
        return terms.total.mean(), terms
    wanted = torch.is_grad_enabled() and any(feature.requires_grad for feature in features)
    total, *values = _Halves.apply(compute, wanted, *features)
    return total.mean(), LossTerms(*values)


class _Halves(torch.autograd.Function):
    """The total (B,) and the terms of a batch; the gradients are computed along with them, as backward runs in one
    thread."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, wanted: bool, *features: Tensor) -> tuple[Tensor, ...]:
        count = len(features[0])
        first, second = slice((count + 1) // 2), slice((count + 1) // 2, count)
        half = partial(_terms_and_gradients, compute, wanted, features)
        parts = [torch.cat(pair) for pair in zip(*_both(partial(half, first), partial(half, second)), strict=True)]
        values, gradients = parts[: len(_TERMS)], parts[len(_TERMS) :]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*values)
        return LossTerms(*values).total, *values

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the features. outer: the gradient of the total (B,); those of the terms are 0."""
        scale = outer[0][:, None, None, None]
        return None, None, *(gradient * scale.to(gradient) for gradient in ctx.saved_tensors)


def _terms_and_gradients(compute: Compute, wanted: bool, features: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Return the terms of ``rows`` and, if ``wanted``, the gradients of their total with respect to the features."""
    with torch.set_grad_enabled(wanted):
        leaves = [feature[rows].detach().requires_grad_(wanted) for feature in features]
        terms = compute(rows, leaves)
        gradients = torch.autograd.grad(terms.total.sum(), leaves) if wanted else ()
    return [*(getattr(terms, name).detach() for name in _TERMS), *gradients]


def _both(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """Return the results of both, computed at once, the second one in another thread."""
    grad, mixed, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def as_here() -> T:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=mixed):  # a thread has its own
            return second()

    with _half_of_the_cores(), ThreadPoolExecutor(1) as other:
        later = other.submit(as_here)
        return first(), later.result()


@contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """Within, each thread computes with half of the threads that torch uses; a new thread takes the number over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // 2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
