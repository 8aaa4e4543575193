"""Make pipelines of the published shapes with random weights, to benchmark cost alone: their images are noise."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from localctl.architectures import TABLE
from localctl.bases import MICRO_WEIGHTS
from localctl.pipelines import choose_pil_processors, freeze

_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_pipeline(base: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a pipeline with the full U-Net of a known base (sd15, sd21, sdxl).

    The text encoders have their usual width but one layer, the VAE has few channels, and the tokenizer is that of the
    embedded base. Generate with ``output_type="latent"``.
    """
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
        nn.Module.to(module, dtype)  # diffusers' own .to() warns of modules to keep in float32, even without any
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
    """Return a U-Net whose weights repeat one block of random numbers, which is much faster than sampling them all."""
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
