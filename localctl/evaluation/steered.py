"""Steer the base with what an evaluation compares: an adapter, a ControlNet, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import ControlNetModel
from PIL import Image

from localctl.adapter import LocalAdapter
from localctl.adapter_files import SavedAdapter
from localctl.architectures import read_shape
from localctl.control.base import Control
from localctl.control.compatible import check_base
from localctl.control.image_controls import LocalAdapterControl, MaskedControlNet
from localctl.data import Example
from localctl.denoisers.abilities import ONLY_UNETS, Abilities
from localctl.distributed import process_device
from localctl.evaluation.settings import FidSettings
from localctl.files import first_line
from localctl.layout import Layout
from localctl.messages import no_progress_bars
from localctl.pipelines import DTYPES, freeze, resolve_base
from localctl.sampling import Sampling, generate
from localctl.schedulers import check_seedable


def generate_like(
    pipe: Any,
    examples: Sequence[Example],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steering: LocalAdapter | ControlNetModel | None,
    weight: float = 1.0,
    sampling: Sampling | None = None,
    *,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    **guidance: Any,
) -> list[Image.Image]:
    """Generate one image per example: its condition applies inside its mask.

    Args:
        prompts, seeds: one of each per example.
        steering: an adapter or a ControlNet; None: the base alone, without conditions and masks.
        weight: strength of ``steering``.
        arguments: further ones of the pipeline.
        guidance: further settings of the adapter's :class:`LocalAdapterControl`.
    """
    masks = torch.stack([example.mask for example in examples if example.mask is not None])
    condition = torch.stack([example.condition for example in examples])
    controls: list[Control] = []
    if isinstance(steering, LocalAdapter):
        controls.append(LocalAdapterControl(steering, condition, masks, weight=weight, **guidance))
    elif steering is not None:
        controls.append(MaskedControlNet(steering, condition, masks, weight=weight))
    return generate(
        pipe,
        [Layout(prompt, *condition.shape[-2:]) for prompt in prompts],
        controls,
        seeds,
        paired=True,
        sampling=sampling,
        prompt_weighting=False,  # captions of data, encoded as in training
        **arguments,
    ).images


def load_adapter(adapter: SavedAdapter, settings: FidSettings) -> LocalAdapter:
    """Load the adapter, and warn when it was trained on another base of the same shape.

    ValueError when the adapter does not fit the base, or was trained on another condition.
    """
    if adapter.condition not in (None, settings.condition):
        raise ValueError(
            f"The adapter {adapter.name} was trained on {adapter.condition}, not {settings.condition}; set "
            "condition to the former."
        )
    if sentence := check_base(adapter, settings.base.name, read_shape(settings.base)):
        warnings.warn(sentence, stacklevel=2)
    return adapter.load()


def suited(settings: FidSettings) -> tuple[FidSettings, str | None]:
    """Return the settings with the guidance that suits the base, where they leave it open, and the negative prompt.

    ValueError for settings that the base would ignore, or a size or a ControlNet that is not for it.
    """
    resolve_base(settings.base.name)
    known = Abilities(settings.base, read_shape(settings.base))
    known.check_settings(settings, "")
    names = [name for name in ("guidance_scale", "true_cfg_scale") if getattr(settings, name) is None]
    settings = replace(settings, **{name: getattr(known.sampling, name) for name in names})
    if settings.scheduler or not known.is_unet:
        check_seedable(known.scheduler(settings.scheduler) or "", known.pipeline)
    if settings.control_guidance_scale is not None:
        known.check_own_guidance()
    guided = known.guidance.is_on(settings)
    if settings.unconditional_scale not in (None, 1) and not guided:
        raise ValueError(
            f"unconditional_scale={settings.unconditional_scale:g} does nothing without guidance; "
            f"{known.guidance.way_on('')}, or leave it out."
        )
    if any(side % known.multiple for side in settings.data.size):
        raise ValueError(
            f"The base {settings.base.name} generates sides that are multiples of {known.multiple} pixels, not "
            f"{settings.data.size[1]}x{settings.data.size[0]}; set data.resolution."
        )
    if settings.controlnet is not None and not known.is_unet:
        raise ValueError(f"ControlNets act {ONLY_UNETS}, not on a {known.family.name}; use an adapter trained for it.")
    return settings, known.guidance.negative_prompt if guided else None


def load_controlnet(settings: FidSettings) -> ControlNetModel | None:
    """Load ``settings.controlnet``, frozen; None where it is not set. ValueError when it cannot be loaded."""
    if settings.controlnet is None:
        return None
    folder = Path(settings.controlnet).expanduser()
    if not folder.is_dir():
        raise ValueError(f"The ControlNet folder {folder} does not exist; give one that diffusers saved.")
    try:
        with no_progress_bars():
            options = {"local_files_only": True, "use_safetensors": True, "dtype": DTYPES[settings.base.dtype]}
            net = ControlNetModel.from_pretrained(str(folder), **options)
    except Exception as error:  # missing or truncated files and other shapes raise various types
        raise ValueError(
            f"The ControlNet in {folder} cannot be loaded ({first_line(error)}); save it again."
        ) from error
    return freeze(net).to(process_device(settings.device))
