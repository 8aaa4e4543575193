"""The shape of a base without its weights: its configs, and its parts on the meta device.

From the base's own files where there are any, from the table below for the well-known bases where there are none: so a
run can be planned, and its mistakes found, before anything is fetched.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from localctl.bases import BASES, BaseConfig, check_folder, not_loaded, read_index, read_json, resolve_base

Config = Mapping[str, Any]

_VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
_SD21_TEXT: Config = {**_CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
_SDXL_TEXT_2: Config = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "vocab_size": 49408,
}
_SD: Config = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}  # levels: as the class has them
TABLE: Mapping[str, Mapping[str, Config]] = {
    "sd15": {
        "unet": {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        "vae": _VAE,
        "text_encoder": _CLIP_L,
    },
    "sd21": {
        "unet": {
            **_SD,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "sample_size": 96,
        },
        "vae": _VAE,
        "text_encoder": {**_SD21_TEXT, "num_attention_heads": 16},
    },
    "sdxl": {
        "unet": {
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        "vae": _VAE,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _SDXL_TEXT_2,
    },
}
TEXT_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


@dataclass(frozen=True)
class BaseShape:
    """The configs of a base's parts: ``unet``, ``vae``, ``text_encoder`` and, for SDXL, ``text_encoder_2``.

    from_table: they are those of the well-known base, as none of its files are here.
    """

    parts: Mapping[str, Config]
    from_table: bool = False
    _built: dict[tuple[str, torch.dtype], nn.Module] = field(default_factory=dict, repr=False, compare=False)

    @property
    def xl(self) -> bool:
        """Whether the U-Net takes pooled texts and sizes, as SDXL's does."""
        return self.parts["unet"].get("addition_embed_type") == "text_time"

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.parts["vae"]["block_out_channels"]) - 1)

    def build(self, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The part on the meta device: shapes without weights, frozen, in eval mode; made once, as large ones take
        seconds, so leave it as it is."""
        if (part, dtype) in self._built:
            return self._built[part, dtype]
        config = dict(self.parts[part])
        with torch.device("meta"):
            if part == "unet":
                module: nn.Module = UNet2DConditionModel.from_config(config)
            elif part == "vae":
                module = AutoencoderKL.from_config(config)
            else:
                transformers = importlib.import_module("transformers")  # slow, and only sizes are asked of it
                module = getattr(transformers, TEXT_CLASSES[part])(transformers.CLIPTextConfig(**config))
        nn.Module.to(module, dtype)  # diffusers' own warns of modules to keep in float32, even of none
        self._built[part, dtype] = module.eval().requires_grad_(False)
        return module


def read_shape(base: BaseConfig) -> BaseShape:
    """The shape of a base, from its folder or cache; else from the table; else its configs are fetched.

    ValueError when the base is not there or of another kind.
    """
    spec = resolve_base(base.name)
    where = {"revision": base.revision, "local_files_only": True}
    try:
        return BaseShape(_read_parts(base, where))
    except LocalEntryNotFoundError as error:
        for name, parts in TABLE.items():
            if BASES[name].id_or_path == spec.id_or_path:
                return BaseShape(parts, from_table=True)
        if base.local_files_only:
            raise not_loaded(base, error) from error
    except OSError as error:
        raise not_loaded(base, error) from error
    try:
        return BaseShape(_read_parts(base, where | {"local_files_only": False}))
    except OSError as error:
        raise not_loaded(base, error) from error


def _read_parts(base: BaseConfig, where: dict[str, Any]) -> dict[str, Config]:
    spec = resolve_base(base.name)
    index = read_index(spec, where)
    check_folder(base, index)
    names = [name for name in ("unet", "vae", *TEXT_CLASSES) if name in index]
    return {name: read_json(spec, f"{name}/config.json", where) for name in names}
