"""Families of denoisers: all knowledge of a denoiser's internals, one module per family, behind one protocol.

A new family is one module with a subclass of :class:`~localctl.denoisers.base.Denoiser`, named in ``FAMILIES``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from localctl.denoisers.base import Denoiser
from localctl.denoisers.unet import UNet

FAMILIES: tuple[type[Denoiser], ...] = (UNet,)


def denoiser_of(pipe: Any) -> Denoiser:
    """Return the denoiser of a diffusers pipeline. ValueError for a pipeline without one of a known family."""
    for family in FAMILIES:
        module = getattr(pipe, family.attribute, None)
        if module is not None:
            return family(module, pipe)
    raise ValueError(
        f"{type(pipe).__name__} has no {FAMILIES[0].attribute}; attach to a Stable Diffusion 1.x, 2.x or XL pipeline."
    )


def bare_denoiser(module: nn.Module) -> Denoiser:
    """Return a denoiser without a pipeline, for questions that need only its config and shapes.

    ``module`` may be on the meta device.
    """
    return UNet(module)
