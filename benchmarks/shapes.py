"""Pipelines of real shapes with random weights, for benchmarks of cost alone: they draw noise."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from localctl.architectures import TABLE
from localctl.base import MICRO_WEIGHTS, choose_pil_processors, freeze

_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_pipeline(base: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The U-Net of a known base (sd15, sd21, sdxl) in full; text encoders of their widths with one layer, a VAE of few
    channels, the tokenizer of the embedded base. Draw with ``output_type="latent"``."""
    choose_pil_processors()  # before the pipelines are imported
    parts, wide = TABLE[base], base == "sdxl"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer")
    with torch.device(device):
        components: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel.from_config(dict(parts["unet"])).to(dtype),
            "vae": diffusers.AutoencoderKL(
                **{**parts["vae"], "block_out_channels": (8, 8, 8, 8)}, norm_num_groups=4
            ).to(dtype),
            "text_encoder": CLIPTextModel(_text_config(parts["text_encoder"], tokenizer)).to(dtype),
        }
        if wide:
            second = CLIPTextModelWithProjection(_text_config(parts["text_encoder_2"], tokenizer)).to(dtype)
            components |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
    components |= {"tokenizer": tokenizer, "scheduler": diffusers.DDIMScheduler(**_SCHEDULE)}
    if wide:
        pipe: Any = diffusers.StableDiffusionXLPipeline(**components, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            freeze(getattr(pipe, name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_config(values: Any, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{**values, "num_hidden_layers": 1, "vocab_size": len(tokenizer)},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
