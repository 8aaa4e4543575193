"""Make pipelines of the published shapes with random weights, to benchmark cost alone: their images are noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from localctl.architectures import TABLE, Config
from localctl.bases import MICRO_WEIGHTS
from localctl.pipelines import choose_pil_processors, freeze, full_precision_vae

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# What makes a known base small enough for a test, with all of its kinds of blocks; it keeps its number of levels.
_SMALL_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SMALL_VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
_SMALL_UNET = {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16}
_SMALL: Mapping[str, Config] = {
    "sd15": {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": 4},
    "sd21": {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": [2, 2, 4, 4]},
    "sdxl": {
        "block_out_channels": [16, 16, 32],
        "attention_head_dim": [2, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


def shape_of(base: str, *, whole: bool = False, tiny: bool = False) -> Mapping[str, Config]:
    """Return the configs of a known base (sd15, sd21, sdxl).

    whole: False = text encoders of one layer, and a VAE of few channels. tiny: all parts are small, for tests.
    """
    parts: dict[str, dict[str, Any]] = {name: dict(values) for name, values in TABLE[base].items()}
    if tiny:
        parts["unet"] |= {**_SMALL_UNET, **_SMALL[base]}
    if tiny or not whole:
        parts["vae"] |= _SMALL_VAE
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            small = {**_SMALL_TEXT, **({"projection_dim": 16} if name == "text_encoder_2" else {})}
            parts[name] |= small if tiny else {} if whole else {"num_hidden_layers": 1}
    return parts


def random_pipeline(
    base: str, device: torch.device, dtype: torch.dtype, *, whole: bool = False, tiny: bool = False
) -> Any:
    """Return a pipeline with the full U-Net of a known base (sd15, sd21, sdxl).

    The text encoders have their usual width but one layer, and the VAE has few channels, unless ``whole``; then SDXL's
    VAE is float32, as it is for real weights. The tokenizer is that of the embedded base; tiny is as for
    :func:`shape_of`. Generate with ``output_type="latent"``.
    """
    choose_pil_processors()  # before the pipelines are imported
    parts, wide = shape_of(base, whole=whole, tiny=tiny), base == "sdxl"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer")
    with torch.device(device):
        components: dict[str, Any] = {
            "unet": random_unet(parts["unet"], device, dtype),
            "vae": diffusers.AutoencoderKL(**parts["vae"]),
            "text_encoder": CLIPTextModel(text_config(parts["text_encoder"], tokenizer)),
        }
        if wide:
            second = CLIPTextModelWithProjection(text_config(parts["text_encoder_2"], tokenizer))
            components |= {"text_encoder_2": second}
    for module in components.values():
        nn.Module.to(module, dtype)  # diffusers' own .to() warns of modules to keep in float32, even without any
        freeze(module)
    if wide:
        components |= {"tokenizer_2": tokenizer}
    components |= {"tokenizer": tokenizer, "scheduler": diffusers.DDIMScheduler(**SCHEDULE)}
    if wide:
        pipe: Any = diffusers.StableDiffusionXLPipeline(**components, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    if wide and whole and dtype != torch.float32:
        full_precision_vae(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_unet(config: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a U-Net whose weights repeat one block of random numbers, which is much faster than sampling them all."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(dict(config))
    nn.Module.to(unet, dtype)
    unet.to_empty(device=device)
    block = 0.02 * torch.randn(1 << 20, device=device, dtype=dtype)
    for name, parameter in unet.named_parameters():
        flat = parameter.data.view(-1)
        if parameter.ndim == 1:  # as trained ones, norms keep the size of their inputs
            flat.fill_(float(name.endswith("weight")))
            continue
        for part in flat.split(len(block)):
            part.copy_(block[: len(part)])
    return unet


def text_config(values: Config, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{**values, "vocab_size": len(tokenizer)},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
