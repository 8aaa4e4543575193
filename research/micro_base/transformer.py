"""The transformer of the embedded base, in SD3's pipeline: noisy latents, text states (B, T, 256) -> velocity."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from localctl.pipelines import BaseConfig, choose_pil_processors, load_pipeline
from localctl.pipelines import encode_captions as encode_texts
from research.micro_base.flow import FLOW_SHIFT, FlowLoss, Teacher
from research.micro_base.loop import digest, save_tensors
from research.micro_base.unet import Encode, Kind, encode_captions
from research.micro_base.unet_loss import LatentCache, to

WORDS = 32  # tokens of a prompt; captions of basic scenes have up to 17
HEADS, HEAD_DIM, BLOCKS = 5, 32, 6


def new_transformer(text_width: int = 256, patch: int = 1) -> SD3Transformer2DModel:
    """Return an untrained transformer whose blocks change nothing yet (adaLN-Zero, arXiv 2212.09748).

    patch: side of a token in latents.
    """
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=patch,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=text_width,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=text_width,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    modulations = [m for n, m in transformer.named_modules() if n.endswith((".norm1.linear", ".norm1_context.linear"))]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def patch_of(weights: Mapping[str, Tensor]) -> int:
    """Return the patch of a transformer's weights."""
    return int(weights["pos_embed.proj.weight"].shape[-1])


@torch.no_grad()
def transformer_for(cache: LatentCache, patch: int = 1) -> SD3Transformer2DModel:
    """Return an untrained transformer that standardises the text states of a cache, which are far from 0."""
    transformer = new_transformer(cache.states.shape[-1], patch)
    layer, text = transformer.context_embedder, cache.states[:, :-1].float().flatten(0, 1)  # without the pooled ones
    layer.weight /= text.std(0)
    layer.bias -= layer.weight @ text.mean(0)
    return transformer


def transformer_kind(patch: int = 1, teacher: Teacher | None = None) -> Kind:
    """Return the kind of denoiser, for its training with or without a teacher."""
    return Kind(
        "transformer",
        partial(transformer_for, patch=patch),
        lambda model, cache, recipe, focus: FlowLoss(model, cache, focus, teacher),
    )


@torch.no_grad()
def load_teacher(base: Path, cache: LatentCache, captions: list[str], folder: Path, device: torch.device) -> Teacher:
    """Return the U-Net of a base as a teacher for the scenes of a cache.

    folder: keeps the states of the captions.

    Raises:
        ValueError: the base cannot be loaded, or its U-Net does not predict v.
    """
    pipe = load_pipeline(BaseConfig(name=str(base)), device=device)
    kind = pipe.scheduler.config.prediction_type
    if kind != "v_prediction":
        raise ValueError(f"The U-Net of {base} predicts {kind}, and a teacher must predict v_prediction.")
    path = folder / f"teacher-{digest(str(captions), pipe.text_encoder)}.pt"
    if not path.exists():
        found = encode_captions(captions, lambda texts: encode_texts(pipe, texts).states, pipe.tokenizer)
        save_tensors(path, dict(zip(("states", "lengths", "caption_of"), found, strict=True)))
    known = LatentCache(latents=cache.latents[:0], **torch.load(path, weights_only=True))
    return Teacher(pipe.unet, to(known, device), pipe.scheduler.alphas_cumprod.to(device))


def text_towers(clip: CLIPModel) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Return the two text encoders: the CLIP's, and its embeddings with the first layer.

    SD3 reads the states before an encoder's last layer: of the second one, these are those of the words alone.
    """
    towers = []
    for layers in (clip.config.text_config.num_hidden_layers, 1):
        config = copy.deepcopy(clip.config.text_config)
        config.num_hidden_layers = layers
        tower = CLIPTextModelWithProjection(config)
        names = set(tower.state_dict())
        tower.load_state_dict({name: value for name, value in clip.state_dict().items() if name in names})
        towers.append(tower.eval())
    return towers[0], towers[1]


def new_pipeline(vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, transformer: Any) -> Any:
    """Return Stable Diffusion 3's pipeline of the parts, without its third text encoder."""
    choose_pil_processors()
    from diffusers import StableDiffusion3Pipeline  # only now: importing it chooses the processors

    vae.register_to_config(shift_factor=0.0)  # this pipeline reads it
    short = copy.deepcopy(tokenizer)
    short.model_max_length = WORDS
    first, second = text_towers(clip)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,
        text_encoder=first,
        tokenizer=short,
        text_encoder_2=second,
        tokenizer_2=copy.deepcopy(short),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def encoder(pipe: Any) -> Encode:
    """Return a function that encodes texts as the pipeline does: states (B, WORDS + 1, width), the last one pooled."""

    def encode(texts: list[str]) -> Tensor:
        states, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        return torch.cat([states, pooled[:, None]], 1)

    return encode
