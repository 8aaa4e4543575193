"""The optimizer and the moving average of the weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from localctl.training.settings import TrainSettings

Optimizer = Callable[..., torch.optim.Optimizer]


def optimizer_class(settings: TrainSettings) -> Optimizer:
    """Return AdamW of torch or, with ``use_8bit_adam``, of bitsandbytes. ValueError if that is not installed."""
    if not settings.use_8bit_adam:
        return torch.optim.AdamW
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "use_8bit_adam needs the package bitsandbytes, which is not installed; `pip install bitsandbytes` or leave "
            "use_8bit_adam off."
        )
    return importlib.import_module("bitsandbytes").optim.AdamW8bit


def make_optimizer(
    kind: Optimizer, parameters: Sequence[nn.Parameter], settings: TrainSettings
) -> torch.optim.Optimizer:
    """Return an optimizer of ``kind`` for ``parameters`` with the options in ``settings``; torch's own is fused on a
    GPU."""
    fused = {"fused": True} if kind is torch.optim.AdamW and all(p.is_cuda for p in parameters) else {}
    return kind(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        **fused,
    )


def make_ema(adapter: nn.Module, settings: TrainSettings) -> EMAModel | None:
    """Return the running average of the adapter's weights; None without ``use_ema``.

    Its decay grows with the steps, (1 + n) / (10 + n), up to ``ema_decay``, so that the first weights do not dominate
    short runs.
    """
    if not settings.use_ema:
        return None
    parameters = list(adapter.parameters())
    return EMAModel(parameters, decay=settings.ema_decay, foreach=all(p.is_cuda for p in parameters))


@contextmanager
def averaged(adapter: nn.Module, ema: Any) -> Iterator[None]:
    """Within, ``adapter`` has the averaged weights, if there are any; its own are restored at the end, bit for bit."""
    if ema is None:
        yield
        return
    parameters = list(adapter.parameters())
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)
