"""On a CPU, the halves of a batch pass the U-Net at once, each in a thread of its own with half of the cores.

The operations of a small U-Net are too short to be divided among cores: their threads mostly wait for each other. Two
halves share nothing but weights. The sum over both is the same in whatever order they end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from localctl.losses import LossTerms

Compute = Callable[[slice, list[Tensor]], LossTerms]
_TERMS = tuple(field.name for field in fields(LossTerms))


def mean_loss(compute: Compute, features: Sequence[Tensor]) -> tuple[Tensor, LossTerms]:
    """Return the mean of the total loss, to be differentiated with respect to ``features``, and the terms (B,).

    The halves are computed at once on a CPU with at least two threads; otherwise the batch is computed as a whole. Then
    the terms have gradients, too.

    Args:
        compute: returns the terms of the rows in a slice, from the features of these rows: a pure function, for it may
            run in another thread.
        features: (B,c_i,h_i,w_i) per level.
    """
    count = len(features[0])
    if count < 2 or features[0].device.type != "cpu" or torch.get_num_threads() < 2:
        terms = compute(slice(0, count), list(features))
        return terms.total.mean(), terms
    wanted = torch.is_grad_enabled() and any(feature.requires_grad for feature in features)
    total, *values = _Halves.apply(compute, wanted, *features)
    return total.mean(), LossTerms(*values)


class _Halves(torch.autograd.Function):
    """The total (B,) and the terms of a batch; the gradients are computed along with them, as backward runs in one
    thread."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, wanted: bool, *features: Tensor) -> tuple[Tensor, ...]:
        middle = (len(features[0]) + 1) // 2
        first, second = slice(0, middle), slice(middle, len(features[0]))
        with _half_of_the_cores(), ThreadPoolExecutor(1) as other:
            later = other.submit(_terms_and_gradients, compute, wanted, second, features)
            now = _terms_and_gradients(compute, wanted, first, features)
        parts = [torch.cat(pair) for pair in zip(now, later.result(), strict=True)]
        values, gradients = parts[: len(_TERMS)], parts[len(_TERMS) :]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*values)
        return LossTerms(*values).total, *values

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the features. outer: the gradient of the total (B,); those of the terms are 0."""
        scale = outer[0][:, None, None, None]
        return None, None, *(gradient * scale.to(gradient) for gradient in ctx.saved_tensors)


def _terms_and_gradients(compute: Compute, wanted: bool, rows: slice, features: Sequence[Tensor]) -> list[Tensor]:
    """Return the terms of ``rows`` and, if ``wanted``, the gradients of their total with respect to the features."""
    with torch.set_grad_enabled(wanted):
        leaves = [feature[rows].detach().requires_grad_(wanted) for feature in features]
        terms = compute(rows, leaves)
        gradients = torch.autograd.grad(terms.total.sum(), leaves) if wanted else ()
    return [*(getattr(terms, name).detach() for name in _TERMS), *gradients]


@contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """Within, each thread computes with half of the threads that torch uses; a new thread takes the number over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // 2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
