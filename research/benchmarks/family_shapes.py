"""The published shapes of transformers, and parts of pipelines without weights.

Values are those of each ``transformer/config.json`` on the hub, as far as they differ from the defaults of their class
in diffusers 0.42, here or in localctl/known_bases.yaml. They were read in public copies of these files, and in
diffusers' scripts ``convert_sd3_to_diffusers`` and ``convert_pixart_sigma_to_diffusers``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import Tensor

from localctl.adapter import TOKEN_WIDTH, TOKENS, LocalAdapter
from localctl.architectures import TABLE, Config
from localctl.denoisers import denoiser_of
from localctl.denoisers.packed import Packed
from localctl.prompt_embeds import PromptEmbeds
from localctl.training.adapter_plan import TOKEN_LEVELS

CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(  # of a family's transformer and of its pipeline
    {
        "pixart": ("PixArtTransformer2DModel", "PixArtSigmaPipeline"),
        "sd3": ("SD3Transformer2DModel", "StableDiffusion3Pipeline"),
        "flux": ("FluxTransformer2DModel", "FluxPipeline"),
        "flux2": ("Flux2Transformer2DModel", "Flux2KleinPipeline"),
        "qwen_image": ("QwenImageTransformer2DModel", "QwenImagePipeline"),
        "z_image": ("ZImageTransformer2DModel", "ZImagePipeline"),
    }
)


@dataclass(frozen=True)
class Shape:
    """A base. config: of its transformer. call: arguments of the pipeline in ordinary use, for its guidance."""

    family: str
    config: Config
    call: Mapping[str, Any] = field(default_factory=dict)


def _known(family: str, call: Mapping[str, Any]) -> Shape:
    return Shape(family, TABLE[family]["transformer"], call)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "pixart_sigma": _known("pixart", {"guidance_scale": 4.5}),
        "sd35_medium": _known("sd3", {"guidance_scale": 4.5}),
        "sd35_large": Shape(
            "sd3",
            {
                "attention_head_dim": 64,
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            {"guidance_scale": 3.5},
        ),
        "z_image": _known("z_image", {"guidance_scale": 4.0}),
        "flux2_klein_4b": Shape(
            "flux2",
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
            {"guidance_scale": 4.0},
        ),
        "flux1_dev": _known("flux", {"guidance_scale": 3.5}),
        "qwen_image": _known("qwen_image", {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        "flux2_dev": Shape("flux2", {}, {"guidance_scale": 4.0}),
    }
)
# The same classes small enough for tests, with all of their kinds of blocks.
TINY: Mapping[str, Config] = MappingProxyType(
    {
        "pixart": {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 4,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 4,
            "patch_size": 2,
            "use_additional_conditions": False,
        },
        "sd3": {
            "sample_size": 4,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        "flux": {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        "flux2": {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        "qwen_image": {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4),
        },
        "z_image": {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 4,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [2, 2, 4],
            "axes_lens": [256, 32, 32],
        },
    }
)


def shape_named(base: str, tiny: bool = False) -> Shape:
    """Return the shape of a base. tiny: a small transformer of its family."""
    shape = SHAPES[base]
    return replace(shape, config=TINY[shape.family]) if tiny else shape


def new_transformer(family: str, config: Config, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a frozen transformer with random weights; it never takes more memory than ``dtype`` needs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return getattr(diffusers, CLASSES[family][0]).from_config(dict(config)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def bare_pipeline(family: str, transformer: Any) -> Any:
    """Return a pipeline of the family with this transformer and nothing else, for what needs only shapes."""
    kind = getattr(diffusers, CLASSES[family][1])
    needed = [name for name, one in inspect.signature(kind).parameters.items() if one.default is one.empty]
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return kind(**{name: parts.get(name) for name in needed})


def latent_channels(denoiser: Any) -> int:
    """Return the number of channels of a transformer's latents."""
    return denoiser.channels if isinstance(denoiser, Packed) else denoiser.module.config.in_channels


def text_width(family: str, config: Any) -> int:
    """Return the width C of the prompt embeddings."""
    name = {"pixart": "caption_channels", "z_image": "cap_feat_dim"}.get(family, "joint_attention_dim")
    return getattr(config, name)


def made_texts(denoiser: Any, make: Callable[..., Tensor]) -> PromptEmbeds:
    """Return the prompt embeddings of one image, its tensors by ``make(*sides)``."""
    blank = denoiser.blank_texts()
    pooled = None if blank.pooled is None else make(*blank.pooled.shape)
    return PromptEmbeds(make(*blank.states.shape), pooled, blank.lengths)


def token_adapter(pipe: Any, levels: int = TOKEN_LEVELS, width: int = TOKEN_WIDTH) -> LocalAdapter:
    """Return a new adapter for a pipeline's transformer, with one channel of condition."""
    denoiser: Any = denoiser_of(pipe)
    return LocalAdapter(
        in_channels=1,
        channels=[denoiser.width] * min(levels, len(denoiser.blocks)),
        num_res_blocks=1,
        downscale_factor=pipe.vae_scale_factor * denoiser.patch,
        adapter_type=TOKENS,
        token_width=width,
    )
