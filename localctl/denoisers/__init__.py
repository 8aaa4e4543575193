"""Families of denoisers: all knowledge of a denoiser's internals, one module per family, behind one protocol.

A new family is one module with a subclass of :class:`~localctl.denoisers.base.Denoiser`, named in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from localctl.denoisers.base import Denoiser
from localctl.denoisers.flux import Flux
from localctl.denoisers.flux2 import Flux2
from localctl.denoisers.pixart import PixArt
from localctl.denoisers.qwen_image import QwenImage
from localctl.denoisers.sd3 import SD3
from localctl.denoisers.unet import UNet
from localctl.denoisers.z_image import ZImage

FAMILIES: tuple[type[Denoiser], ...] = (UNet, PixArt, SD3, Flux, Flux2, QwenImage, ZImage)
SUPPORTED = "Stable Diffusion 1.x, 2.x, XL or 3.x, of PixArt, FLUX, Qwen-Image or Z-Image"  # pipelines, for messages


def denoiser_of(pipe: Any) -> Denoiser:
    """Return the denoiser of a diffusers pipeline. ValueError for a pipeline without one of a known family."""
    for family in FAMILIES:
        module = getattr(pipe, family.attribute, None)
        if module is not None and (not family.classes or class_name(module) in family.classes):
            return family(module, pipe)
    other = getattr(pipe, "transformer", None)
    without = "has no unet" if other is None else f"has no unet, and a transformer ({class_name(other)}) not known here"
    raise ValueError(f"{type(pipe).__name__} {without}; attach to a pipeline of {SUPPORTED}.")


def class_name(module: nn.Module) -> str:
    """Return the name of the class of a denoiser, compiled or not."""
    return type(getattr(module, "_orig_mod", module)).__name__


def bare_denoiser(module: nn.Module) -> Denoiser:
    """Return a denoiser without a pipeline, for questions that need only its config and shapes.

    ``module`` may be on the meta device.
    """
    family = next((family for family in FAMILIES if class_name(module) in family.classes), UNet)
    return family(module)


def family_of(config: Mapping[str, Any]) -> type[Denoiser]:
    """Return the family of a denoiser by its config, without building it. ValueError for a transformer not known."""
    name = config.get("_class_name", "UNet2DConditionModel")
    found = next((family for family in FAMILIES if name in family.classes), None)
    if found is None and "UNet" not in name:
        raise ValueError(f"The base has a {name}, which is not known here; choose one of {SUPPORTED}.")
    return found or UNet
