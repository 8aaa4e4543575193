"""Compile what every step repeats (``compile``): the blocks of the frozen U-Net, and the adapter's network.

Blocks of the same shape share a graph ("regional compilation"). Graphs have fixed shapes, one for each, so they do not
depend on which shape came first, and a resumed run computes the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from localctl.files import first_line
from localctl.training.models import Models
from localctl.training.step import StepOutput

logger = logging.getLogger(__name__)
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
GRAPHS = 64  # of one function: a U-Net has about five levels, and images may have several sizes


def uncompiled() -> AbstractContextManager[Any]:
    """Within, nothing compiled runs, as controls change the attention layers while sampling."""
    return torch.compiler.set_stance("force_eager")


class Compilation:
    """The compiled parts of ``models``. If they fail for a new size of image, nothing is compiled from then on."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.active = True
        self._tried: set[torch.Size] = set()
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, GRAPHS)
        for module in models.network.modules():
            if isinstance(module, BLOCKS):
                module.compile(fullgraph=True, dynamic=False)
        models.plain_adapter.adapter.adapter.compile(fullgraph=True, dynamic=False)

    def check(self, size: torch.Size, compute: Callable[[], StepOutput]) -> None:
        """Before the first step of a ``size``, ``compute`` its loss and gradients once, which compiles what it needs.
        No other process takes part, and no gradient is stored."""
        if not self.active or size in self._tried:
            return
        self._tried.add(size)
        models = self.models
        wrapped, models.adapter = models.adapter, models.plain_adapter
        try:
            weights = [p for p in models.plain_adapter.parameters() if p.requires_grad]
            torch.autograd.grad(compute().loss, weights, allow_unused=True)
        except Exception as error:  # of any backend; without compilation the step itself raises what remains
            self._stop()
            cause = getattr(error, "inner_exception", error)  # of the backend
            reason = f"{type(cause).__name__}: {first_line(cause)[:200]}"
            logger.warning(f"compile=true failed ({reason}); the training goes on without it.")
        finally:
            models.adapter = wrapped

    def _stop(self) -> None:
        self.active = False
        for part in (self.models.network, self.models.plain_adapter):
            for module in part.modules():
                module._compiled_call_impl = None
