"""How far two right computations of one number may lie apart, from the arithmetic and not from one machine."""

from __future__ import annotations

import math

import torch

_DEVIATIONS = 6  # of the random walk: 2 exp(-6^2 / 2), once in 30 million numbers


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative difference that rounding may make between two sums of the same ``terms`` numbers.

    Processors, vector widths and libraries add in other orders, and each order rounds elsewhere. One operation is out
    by at most u = eps / 2 of its result. The errors of n operations in a row make a random walk: their sum stays below
    6 sqrt(n) u but once in 30 million numbers (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4; the bound
    that always holds is n u). Two sums may be out on opposite sides, so they differ by at most 2 * 6 sqrt(n) u = 6
    sqrt(n) eps, relative to the sum of the absolute values of the terms.

    Args:
        terms: n, all operations that one number goes through in a row: the length of a sum, or of all sums of a chain
            of layers together.
        dtype: what is computed in; the coarsest one on the way.
    """
    if terms < 1:
        raise ValueError(f"A sum has at least 1 term, not {terms}.")
    return _DEVIATIONS * math.sqrt(terms) * torch.finfo(dtype).eps
