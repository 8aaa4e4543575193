"""Tiny pipelines with what else steers a U-Net: ControlNets, an IP-Adapter, LoRA, photos, offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from attachment_helpers import quiet
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

Built = tuple[Any, dict[str, Any]]  # a pipeline and the arguments its calls need
SQUARE: dict[str, Any] = {"height": 64, "width": 64}


def is_xl(pipe: Any) -> bool:
    return isinstance(pipe, StableDiffusionXLPipeline)


def sibling(pipe: Any, kind: str, **parts: Any) -> Any:
    """The pipeline StableDiffusion{XL}{kind}Pipeline of the same components."""
    name = f"StableDiffusion{'XL' if is_xl(pipe) else ''}{kind}Pipeline"
    options = {} if is_xl(pipe) else {"requires_safety_checker": False}
    return quiet(getattr(diffusers, name)(**{**pipe.components, **parts}, **options))


def with_controlnets(pipe: Any, count: int) -> Built:
    nets = []
    for index in range(count):
        torch.manual_seed(index)
        net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3).eval().requires_grad_(False)
        for parameter in net.parameters():
            if not parameter.any():  # the zero convolutions, or it would change nothing
                parameter.normal_(std=0.1)
        nets.append(net)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    built = sibling(pipe, "ControlNet", controlnet=nets if count > 1 else nets[0])
    return built, {"image": [image] * count if count > 1 else image, **SQUARE}


def with_ip_adapter(pipe: Any) -> Built:
    """Random weights, loaded as diffusers loads them; two pictures, each with its half as mask."""
    torch.manual_seed(1)
    width, tokens = pipe.unet.config.cross_attention_dim, 4
    weights: dict[str, Any] = {"ip_adapter": {}}
    weights["image_proj"] = {
        "proj.weight": torch.randn(tokens * width, 8),
        "proj.bias": torch.randn(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    key = 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k_ip", "to_v_ip"):
                weights["ip_adapter"][f"{key}.{part}.weight"] = torch.randn(attn.to_k.out_features, width)
            key += 2
    pipe.unet._load_ip_adapter_weights([weights])
    pipe.set_ip_adapter_scale(1.0)
    pipe.unet.eval().requires_grad_(False)
    left = torch.zeros(1, 2, 64, 64)
    left[:, 0, :, :32], left[:, 1, :, 32:] = 1, 1
    embeds = [torch.cat([torch.zeros(1, 2, 8), torch.randn(1, 2, 8)])]
    return pipe, {"ip_adapter_image_embeds": embeds, "cross_attention_kwargs": {"ip_adapter_masks": [left]}}


def with_lora(pipe: Any) -> Built:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return pipe, {}


def with_photo(pipe: Any, kind: str, channels: int = 4) -> Built:
    """Image-to-image or inpainting; ``channels`` 9: a U-Net that was made for inpainting."""
    parts = {}
    if channels != 4:
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": channels})
        parts["unet"] = unet.eval().requires_grad_(False)
    options: dict[str, Any] = {
        "image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "strength": 0.6,
        "num_inference_steps": 4,  # of which two are made
    }
    if kind == "Inpaint":
        options |= {"mask_image": torch.ones(1, 1, 64, 64), **SQUARE}
    return sibling(pipe, kind, **parts), options


def with_offload(pipe: Any) -> Built:
    """As ``enable_model_cpu_offload`` does it, which refuses to without a GPU; here from CPU to CPU."""
    hook = None
    for name in pipe.model_cpu_offload_seq.split("->"):
        model = getattr(pipe, name, None)
        if model is not None:
            _, hook = cpu_offload_with_hook(model, torch.device("cpu"), prev_module_hook=hook)
    return pipe, {}


KINDS: dict[str, Callable[[Any], Built]] = {
    "controlnet": lambda pipe: with_controlnets(pipe, 1),
    "two controlnets": lambda pipe: with_controlnets(pipe, 2),
    "ip-adapter": with_ip_adapter,
    "lora": with_lora,
    "img2img": lambda pipe: with_photo(pipe, "Img2Img"),
    "inpaint": lambda pipe: with_photo(pipe, "Inpaint"),
    "inpaint of 9 channels": lambda pipe: with_photo(pipe, "Inpaint", 9),
    "offload": with_offload,
}


def redraw(pipe: Any, prompt: str, latents: Tensor, **options: Any) -> Tensor:
    """Latents after few steps from fixed noise: the given one, or where a photo is drawn over that of a seed."""
    options = {"num_inference_steps": 2, "output_type": "latent", **options}
    start = {"generator": torch.Generator().manual_seed(0)} if "strength" in options else {"latents": latents}
    return pipe(prompt, **start, **options).images
