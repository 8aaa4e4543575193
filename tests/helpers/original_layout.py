"""Write a pipeline as one file in the layout of the original Stable Diffusion code, as from_single_file reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_IN_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_IN_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_IN_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_original(pipe: Any, path: Path) -> Path:
    """Write a Stable Diffusion 1.x pipeline with one layer per block or more."""
    tensors: dict[str, Tensor] = {}
    for name, value in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet(name, pipe.unet)}"] = value
    for name, value in pipe.vae.state_dict().items():
        renamed = _vae(name, len(pipe.vae.config.block_out_channels))
        is_matrix = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", renamed)
        tensors[f"first_stage_model.{renamed}"] = value[..., None, None] if is_matrix else value
    for name, value in pipe.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{bare}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def _unet(name: str, unet: Any) -> str:
    for ours, theirs in _pairs(unet):
        if name.startswith(f"{ours}."):
            rest = name.removeprefix(f"{ours}.")
            if "resnets" in ours:
                part, _, end = rest.partition(".")
                rest = f"{_IN_RESNET[part]}.{end}"
            return f"{theirs}.{rest}"
    raise AssertionError(name)


def _pairs(unet: Any) -> Iterator[tuple[str, str]]:
    """Yield the names of parts, ours and theirs."""
    yield from _IN_UNET.items()
    layers = unet.config.layers_per_block
    for level in range(len(unet.down_blocks)):
        for layer in range(layers):
            place = f"input_blocks.{(layers + 1) * level + layer + 1}"
            yield f"down_blocks.{level}.resnets.{layer}", f"{place}.0"
            yield f"down_blocks.{level}.attentions.{layer}", f"{place}.1"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(layers + 1) * (level + 1)}.0.op"
    for level in range(len(unet.up_blocks)):
        for layer in range(layers + 1):
            place = f"output_blocks.{(layers + 1) * level + layer}"
            yield f"up_blocks.{level}.resnets.{layer}", f"{place}.0"
            yield f"up_blocks.{level}.attentions.{layer}", f"{place}.1"
        after = 2 if getattr(unet.up_blocks[level], "attentions", None) else 1
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{(layers + 1) * level + layers}.{after}.conv"


def _vae(name: str, levels: int) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    up = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.*)", name)
    if up:
        rest = up[2].replace("upsamplers.0", "upsample").replace("resnets", "block")
        name = f"decoder.up.{levels - 1 - int(up[1])}.{rest}"
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for ours, theirs in _IN_ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
