"""Pipelines of transformers with random weights, of any shape, with small tokenizers, text encoders and VAEs: to
benchmark cost, and in small for tests. Their images are noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from localctl.architectures import Config
from localctl.bases import MICRO_WEIGHTS
from localctl.pipelines import choose_pil_processors
from research.benchmarks.family_shapes import CLASSES, TINY, new_transformer, text_width
from research.benchmarks.shapes import SCHEDULE, text_config

Parts = dict[str, Any]
_VAE: Config = {
    "block_out_channels": (4, 4, 8, 8),  # four levels: shrinks by 8
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
_SMALL: Config = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def family_pipeline(
    family: str,
    config: Config | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: CLIPTokenizer | None = None,
) -> Any:
    """Return a frozen pipeline of a family.

    config: of the transformer; None: the tiny one. tokenizer: CLIP's; None: that of the embedded base.
    """
    choose_pil_processors()  # before the pipelines are imported
    place = device or torch.device("cpu")
    clip = tokenizer or CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer")
    transformer = new_transformer(family, TINY[family] if config is None else config, place, dtype)
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = flow(shift=3.0, use_dynamic_shifting=family in ("flux", "flux2", "qwen_image"))
    parts: Parts = {"transformer": transformer, "scheduler": scheduler, **_REST[family](transformer.config, clip)}
    return _frozen(getattr(diffusers, CLASSES[family][1])(**parts), place, dtype)


def small_sd3(device: torch.device, dtype: torch.dtype, patch: int = 2) -> Any:
    """Return the pipeline of the transformer that can be trained in the place of the embedded base's U-Net, with random
    weights and the other parts of that base. patch: side of a token in latents."""
    choose_pil_processors()
    from research.micro_base.transformer import new_pipeline, new_transformer

    clip = CLIPModel.from_pretrained(MICRO_WEIGHTS / "clip")
    vae = diffusers.AutoencoderKL.from_pretrained(MICRO_WEIGHTS / "vae")
    transformer = new_transformer(patch=patch)
    for parameter in transformer.parameters():
        if not parameter.any():  # a block that changes nothing has no gradients either
            nn.init.normal_(parameter, std=0.02)
    pipe = new_pipeline(vae, clip, CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer"), transformer)
    return _frozen(pipe, device, dtype)


def _frozen(pipe: Any, device: torch.device, dtype: torch.dtype) -> Any:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, device, dtype)  # diffusers' own .to() warns of modules to keep in float32
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's fast tokenizer in small: single characters and some words, an end token and no start token."""
    words = ["▁", "▁a", "▁cat", "▁dog", "s", ",", "▁dogs", *(chr(code) for code in range(97, 123)), "."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(len(words))) for word in words)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer in small: single bytes, and each word of the template, which has 34 tokens before the prompt."""
    first = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*first, "<|endoftext|>"])}, merges=[], model_max_length=512
    )
    words = (
        "Describe the image by detailing color shape size texture quantity text spatial relationships of objects and"
    )
    tokens = ["<|im_start|>", "<|im_end|>", "system", "user", "assistant", "Describe", " background"]
    tokenizer.add_tokens([*tokens, *(f" {word}" for word in words.split()[1:])])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def _vae(channels: int, **options: Any) -> Any:
    vae = diffusers.AutoencoderKL(**_VAE, latent_channels=channels, sample_size=64)
    vae.register_to_config(**options)
    return vae


def _t5(tokenizer: PreTrainedTokenizerFast, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _clip(kind: Any, tokenizer: CLIPTokenizer, width: int) -> Any:
    return kind(text_config({**_SMALL, "hidden_size": width, "projection_dim": width}, tokenizer))


def _qwen3(kind: Any, tokenizer: Qwen2Tokenizer, width: int, layers: int) -> Any:
    options = {**_SMALL, "num_hidden_layers": layers, "num_key_value_heads": 2, "head_dim": 8}
    return kind(Qwen3Config(vocab_size=len(tokenizer), hidden_size=width, **options))


def _pixart(config: Any, clip: CLIPTokenizer) -> Parts:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _t5(tokenizer, text_width("pixart", config)),
        "vae": _vae(config.in_channels),
        "scheduler": diffusers.DPMSolverMultistepScheduler.from_config(diffusers.DDIMScheduler(**SCHEDULE).config),
    }


def _sd3(config: Any, clip: CLIPTokenizer) -> Parts:
    tokenizer, half = t5_tokenizer(), config.pooled_projection_dim // 2
    return {
        "vae": _vae(config.in_channels, shift_factor=0.1),
        "text_encoder": _clip(CLIPTextModelWithProjection, clip, half),
        "tokenizer": clip,
        "text_encoder_2": _clip(CLIPTextModelWithProjection, clip, half),
        "tokenizer_2": clip,
        "text_encoder_3": _t5(tokenizer, text_width("sd3", config)),
        "tokenizer_3": tokenizer,
    }


def _flux(config: Any, clip: CLIPTokenizer) -> Parts:
    tokenizer = t5_tokenizer()
    return {
        "vae": _vae(config.in_channels // 4, shift_factor=0.1),
        "text_encoder": _clip(CLIPTextModel, clip, config.pooled_projection_dim),
        "tokenizer": clip,
        "text_encoder_2": _t5(tokenizer, text_width("flux", config)),
        "tokenizer_2": tokenizer,
    }


def _flux2(config: Any, clip: CLIPTokenizer) -> Parts:
    tokenizer, options = qwen_tokenizer(), {name: _VAE[name] for name in _VAE if "types" not in name}
    return {
        "vae": diffusers.AutoencoderKLFlux2(**options, latent_channels=config.in_channels // 4, sample_size=64),
        # The pipeline joins the states after three of its layers, the last one being the 27th.
        "text_encoder": _qwen3(Qwen3ForCausalLM, tokenizer, text_width("flux2", config) // 3, 28),
        "tokenizer": tokenizer,
    }


def _qwen_image(config: Any, clip: CLIPTokenizer) -> Parts:
    tokenizer, channels, width = qwen_tokenizer(), config.out_channels, text_width("qwen_image", config)
    quarter = width // 2 // 2 // 4  # of the angles of a head
    text = {
        **_SMALL,
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [quarter, quarter, 2 * quarter], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return {
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, 0.0, -0.1, 0.2] * (channels // 4),
            latents_std=[1.0, 2.0, 1.5, 1.0] * (channels // 4),
        ),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        "tokenizer": tokenizer,
    }


def _z_image(config: Any, clip: CLIPTokenizer) -> Parts:
    tokenizer = qwen_tokenizer()
    return {
        "vae": _vae(config.in_channels, shift_factor=0.1),
        "text_encoder": _qwen3(Qwen3Model, tokenizer, text_width("z_image", config), 2),
        "tokenizer": tokenizer,
    }


_REST: Mapping[str, Callable[[Any, CLIPTokenizer], Parts]] = MappingProxyType(
    {
        "pixart": _pixart,
        "sd3": _sd3,
        "flux": _flux,
        "flux2": _flux2,
        "qwen_image": _qwen_image,
        "z_image": _z_image,
    }
)
