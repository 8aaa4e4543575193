"""The architecture of a base without its weights: its configs, and its parts on the meta device.

The configs come from the base's own files; without these, those of well-known bases come from known_bases.yaml. So a
run can be planned, and its settings checked, before anything is downloaded.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from localctl.bases import (
    BASES,
    TRANSFORMER_PIPELINES,
    BaseConfig,
    check_folder,
    has_part,
    not_loaded,
    read_index,
    read_json,
    resolve_base,
)
from localctl.sizes import shown

Config = Mapping[str, Any]

TABLE: Mapping[str, Mapping[str, Config]] = yaml.safe_load((Path(__file__).parent / "known_bases.yaml").read_text())
TEXT_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
CLASS = "_class_name"  # in the config of a part
_DIFFUSERS = ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderKLQwenImage", "AutoencoderKLFlux2") + tuple(
    f"{name}Transformer2DModel" for name in ("PixArt", "SD3", "Flux", "Flux2", "QwenImage", "ZImage")
)
_TRANSFORMERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Qwen3Model", "Qwen3ForCausalLM") + (
    *("Qwen2_5_VLForConditionalGeneration", "Mistral3ForConditionalGeneration"),
)
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_PARTS = ("unet", "transformer", "vae", *TEXT_PARTS)


@dataclass(frozen=True)
class BaseShape:
    """The configs of a base's parts: ``unet`` or ``transformer``, ``vae``, and its text encoders.

    from_table: whether they come from known_bases.yaml, as the files of the base are not here. index: its
    ``model_index.json`` or, for a transformer whose files are not here, what is known of it.
    """

    parts: Mapping[str, Config]
    from_table: bool = False
    index: Config = field(default_factory=dict)

    @property
    def denoiser(self) -> str:
        """The name of the part that denoises: ``unet`` or ``transformer``."""
        return "unet" if "unet" in self.parts else "transformer"

    @property
    def xl(self) -> bool:
        """Whether the U-Net takes pooled prompt embeddings and sizes, as SDXL's does."""
        return self.parts.get("unet", {}).get("addition_embed_type") == "text_time"

    @property
    def vae_scale_factor(self) -> int:
        """Width of a latent pixel in image pixels."""
        vae = self.parts["vae"]
        halved = vae.get("temperal_downsample")  # of Qwen-Image's, one for videos
        return 2 ** (len(vae["block_out_channels"]) - 1 if halved is None else len(halved))

    def build(self, part: str) -> nn.Module:
        """Return a part on the meta device: float32 shapes without weights, frozen, in eval mode. It is built once for
        all shapes with its config, as large parts take seconds, and must not be changed."""
        return _built(part, json.dumps(dict(self.parts[part]), sort_keys=True))


@functools.lru_cache(maxsize=16)
def _built(part: str, config: str) -> nn.Module:
    with torch.device("meta"):
        return _new(part, json.loads(config)).eval().requires_grad_(False)


def _new(part: str, config: dict[str, Any]) -> nn.Module:
    kind = config.get(CLASS) or {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", **TEXT_CLASSES}[part]
    if kind in _DIFFUSERS:
        return getattr(diffusers, kind).from_config(config)
    if kind not in _TRANSFORMERS:
        raise ValueError(f"The {part} of the base is a {shown(kind)}, which is not known here; choose another base.")
    model = getattr(importlib.import_module("transformers"), kind)  # slow to import
    return model(model.config_class(**{name: value for name, value in config.items() if name != CLASS}))


def read_shape(base: BaseConfig) -> BaseShape:
    """Return the architecture of a base from its folder or cache, else from known_bases.yaml, else from the hub.

    ValueError when the base cannot be found, or has an unsupported pipeline.
    """
    try:
        return _read(base, local_files_only=True)
    except LocalEntryNotFoundError as error:
        for name, parts in TABLE.items():
            if BASES[name].id_or_path == resolve_base(base.name, one_file=True).id_or_path:
                kinds = BASES[name].pipelines  # a U-Net's class follows from its config
                index = {CLASS: kinds[0], "is_distilled": name == "flux2"} if kinds else {}
                return BaseShape(parts, from_table=True, index=index)
        if base.local_files_only:
            raise not_loaded(base, error) from error
    except OSError as error:
        raise not_loaded(base, error) from error
    try:
        return _read(base, local_files_only=False)
    except OSError as error:
        raise not_loaded(base, error) from error


def _read(base: BaseConfig, local_files_only: bool) -> BaseShape:
    spec, where = (
        resolve_base(base.name, one_file=True),
        {"revision": base.revision, "local_files_only": local_files_only},
    )
    index = read_index(spec, where)
    check_folder(base, index)
    names = [name for name in _PARTS if has_part(index, name)]
    parts = {name: read_json(spec, f"{name}/config.json", where) for name in names}
    if index["_class_name"] in TRANSFORMER_PIPELINES:  # the classes of text encoders stand in the index alone
        parts = {name: {**config, CLASS: index[name][1]} for name, config in parts.items()}
    return BaseShape(parts, index=index)
