"""How deep a network computes, for tolerances that follow from the arithmetic (``tolerances.rounding``)."""

from __future__ import annotations

from torch import nn


def depth(*modules: nn.Module) -> int:
    """How many products are summed up on the longest way through the modules, one after the other: the inputs of one
    output of every layer. Layers that stand beside each other count, too, so it is rather too many."""
    return sum(p[0].numel() for module in modules for p in module.parameters() if p.ndim > 1)
