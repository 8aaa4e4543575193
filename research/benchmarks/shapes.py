"""Pipelines of real shapes with random weights, for research/benchmarks of cost alone: they generate noise."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from localctl.architectures import TABLE
from localctl.pipelines import MICRO_WEIGHTS, choose_pil_processors, freeze

_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_pipeline(base: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the U-Net of a known base (sd15, sd21, sdxl) in full; text encoders of their widths with one layer, a VAE
    of few channels, the tokenizer of the embedded base. Generate with ``output_type="latent"``."""
    choose_pil_processors()  # before the pipelines are imported
    parts, wide = TABLE[base], base == "sdxl"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer")
    with torch.device(device):
        components: dict[str, Any] = {
            "unet": random_unet(parts["unet"], device),
            "vae": diffusers.AutoencoderKL(**{**parts["vae"], "block_out_channels": (8, 8, 8, 8)}, norm_num_groups=4),
            "text_encoder": CLIPTextModel(_text_config(parts["text_encoder"], tokenizer)),
        }
        if wide:
            second = CLIPTextModelWithProjection(_text_config(parts["text_encoder_2"], tokenizer))
            components |= {"text_encoder_2": second}
    for module in components.values():
        nn.Module.to(module, dtype)  # diffusers' own warns of modules to keep in float32, even of none
        freeze(module)
    if wide:
        components |= {"tokenizer_2": tokenizer}
    components |= {"tokenizer": tokenizer, "scheduler": diffusers.DDIMScheduler(**_SCHEDULE)}
    if wide:
        pipe: Any = diffusers.StableDiffusionXLPipeline(**components, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_unet(config: Any, device: torch.device) -> nn.Module:
    """With one block of random numbers over and over for weights, which is much faster than to sample them all."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(dict(config))
    unet.to_empty(device=device)
    block = 0.02 * torch.randn(1 << 20, device=device)
    for parameter in unet.parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(block)):
            part.copy_(block[: len(part)])
    return unet


def _text_config(values: Any, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{**values, "num_hidden_layers": 1, "vocab_size": len(tokenizer)},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
