"""Steer the base with what an evaluation compares: an adapter, a ControlNet, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
from localctl.distributed import process_device
from localctl.evaluation.settings import FidSettings
from localctl.files import first_line
from localctl.layout import Layout
from localctl.messages import no_progress_bars
from localctl.pipelines import DTYPES, freeze
from localctl.sampling import Sampling, generate


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
