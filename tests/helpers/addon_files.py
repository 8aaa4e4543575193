"""Addons with random weights in the formats that people publish: LoRAs, IP-Adapters, learned words, ControlNets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

_UNET = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("q_proj", "v_proj", "fc1")
IMAGE_WIDTH = 12


def lora_state(pipe: Any, seed: int, *parts: str, size: float = 1.0) -> dict[str, Tensor]:
    """The factors of a LoRA of rank 2 on these parts of a pipeline, by PEFT's names in diffusers' files."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for part in parts or ("unet",):
        for name, module in getattr(pipe, part).named_modules():
            if name.endswith(_TEXT if part.startswith("text") else _UNET):
                # Published files have this prefix, whatever newer releases of transformers call the part.
                inside = "text_model." if part.startswith("text") and not name.startswith("text_model.") else ""
                stem = f"{part}.{inside}{name}.lora_"
                state[f"{stem}A.weight"] = torch.randn(2, module.in_features, generator=generator) * size
                state[f"{stem}B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    return state


def save_lora(path: Path, pipe: Any, seed: int = 1, *parts: str, size: float = 1.0) -> Path:
    save_file(lora_state(pipe, seed, *parts, size=size), path)
    return path


def as_kohya(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The same factors by the names of kohya's scripts, with an alpha for each layer."""
    renamed = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        layer, _, end = rest.partition(".lora_")
        stem = f"lora_{'unet' if part == 'unet' else 'te'}_{layer.replace('.', '_')}"
        renamed[f"{stem}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = value
        renamed[f"{stem}.alpha"] = torch.tensor(alpha)
    return renamed


def save_ip_adapter(folder: Path, pipe: Any, seed: int = 1, name: str = "ip-adapter", tokens: int = 4) -> Path:
    """A plain IP-Adapter and its image encoder, as they are published."""
    folder.mkdir(exist_ok=True)
    generator, width = torch.Generator().manual_seed(seed), pipe.unet.config.cross_attention_dim
    state = {
        "image_proj.proj.weight": torch.randn(tokens * width, IMAGE_WIDTH, generator=generator),
        "image_proj.proj.bias": torch.randn(tokens * width, generator=generator),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    layers = [key for key in pipe.unet.attn_processors]
    for index, key in enumerate(layers):
        if key.endswith("attn2.processor"):
            hidden = pipe.unet.get_submodule(key.removesuffix(".processor")).to_k.out_features
            for kind in ("k", "v"):
                state[f"ip_adapter.{index}.to_{kind}_ip.weight"] = torch.randn(hidden, width, generator=generator)
    save_file(state, folder / f"{name}.safetensors")
    save_encoder(folder / "image_encoder")
    return folder / f"{name}.safetensors"


def save_encoder(folder: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=IMAGE_WIDTH,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def save_word(path: Path, width: int, word: str = "<toy>", vectors: int = 1, seed: int = 1) -> Path:
    save_file({word: torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))}, path)
    return path


def random_controlnet(pipe: Any, seed: int = 0, **config: Any) -> ControlNetModel:
    """Make a ControlNet of the U-Net's shape, with random weights in its zero convolutions."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    net.register_to_config(**config)
    return net
