"""The frozen parts of a base as training uses them: all of them, or only those that a job needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from localctl.architectures import TEXT_PARTS, BaseShape, read_shape
from localctl.bases import BaseConfig, vae_not_loaded
from localctl.diffusion import is_for_videos
from localctl.messages import no_progress_bars
from localctl.pipelines import DTYPES, full_precision_vae, is_xl, load_pipeline
from localctl.training.frozen_layers import keep_less
from localctl.training.large_bases import offload, quantized
from localctl.training.settings import TrainSettings

WEIGHTS = ("unet", "transformer", "vae", *TEXT_PARTS)


def load_frozen(
    settings: TrainSettings, device: torch.device, dtype: torch.dtype | None, without: Collection[str] = ()
) -> DiffusionPipeline:
    """Load the base with its parts as training uses them.

    Args:
        dtype: of the frozen parts; None = of the base's config.
        without: parts whose weights are not read; shapes and config on the meta device stand in for them.
    """
    absent = _absent(settings.base, without)
    options: dict[str, Any] = dict.fromkeys(absent)
    offloaded = settings.offload_base and "transformer" not in without
    if settings.quantization is not None and "transformer" not in without:
        own = dtype or DTYPES[settings.base.dtype]
        options["quantization_config"] = quantized(settings.quantization, own, device)
    with no_progress_bars():
        place = torch.device("cpu") if offloaded else device
        pipe = load_pipeline(settings.base, dtype=dtype, device=place, **options)
    if offloaded:
        offload(pipe, device)
    for name, part in absent.items():
        pipe.register_modules(**{name: part})
    pipe.set_progress_bar_config(disable=True)
    unet = getattr(pipe, "unet", None)
    if "vae" in absent:
        pipe.vae_scale_factor = read_shape(settings.base).vae_scale_factor
    elif unet is not None and is_xl(pipe) and pipe.vae.dtype != torch.float32 and pipe.vae.config.force_upcast:
        full_precision_vae(pipe)
    if device.type == "cpu":  # on a GPU, normalisation copies every activation to the other format: 5 % slower
        for name in {"unet", "vae"} - set(absent):
            if hasattr(pipe, name) and not is_for_videos(pipe.vae):
                getattr(pipe, name).to(memory_format=torch.channels_last)
        if unet is not None and "unet" not in absent:
            keep_less(unet)  # not measured on GPUs, where the host has little time to spare for each layer
    return pipe


def _absent(base: BaseConfig, without: Collection[str]) -> dict[str, nn.Module]:
    """Return stand-ins for the parts ``without``, as far as the base has them."""
    if not without:
        return {}
    shape = read_shape(base)
    return {name: _stand_in(base, shape, name) for name in WEIGHTS if name in without and name in shape.parts}


def _stand_in(base: BaseConfig, shape: BaseShape, name: str) -> nn.Module:
    if name != "vae" or base.vae is None:
        return shape.build(name)
    place = Path(base.vae).expanduser()
    inside = "vae" if (place / "model_index.json").is_file() else None
    try:
        config = AutoencoderKL.load_config(
            str(place) if place.is_dir() else base.vae, subfolder=inside, local_files_only=base.local_files_only
        )
    except OSError as error:
        raise vae_not_loaded(base.vae, error) from error
    return replace(shape, parts={**shape.parts, "vae": config}).build("vae")


def dtype_of(settings: TrainSettings, precision: str) -> torch.dtype:
    """Return the dtype of the frozen parts under the mixed precision ``precision``: no, fp16 or bf16."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, DTYPES[settings.base.dtype])


def dtype_name(settings: TrainSettings, precision: str) -> str:
    """Return the name of :func:`dtype_of`, such as float32."""
    return str(dtype_of(settings, precision)).removeprefix("torch.")
