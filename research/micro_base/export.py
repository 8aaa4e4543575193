"""Export the trained parts as an ordinary diffusers folder (fp16 safetensors)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from localctl.pipelines import choose_pil_processors
from research.micro_base.transformer import new_pipeline
from research.micro_base.unet import new_scheduler


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """Return the text tower of the CLIP as the class that Stable Diffusion uses."""
    tower = CLIPTextModel(clip.config.text_config)
    state = {k.removeprefix("text_model."): v for k, v in clip.state_dict().items() if k.startswith("text_model.")}
    names = set(tower.state_dict())
    prefix = "text_model." if any(n.startswith("text_model.") for n in names) else ""
    tower.load_state_dict({prefix + k: v for k, v in state.items()})
    return tower.eval()


def export(
    folder: Path,
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    prediction_type: str = "v_prediction",
    text: CLIPTextModel | None = None,
) -> int:
    """Write the pipeline to ``folder`` and the whole CLIP to ``folder/clip``; return the size in bytes.

    text: the text encoder of the U-Net; None: the text tower of the CLIP.
    """
    choose_pil_processors()
    from diffusers import StableDiffusionPipeline  # only now: importing it chooses the processors

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text or text_tower(clip),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder, clip, tokenizer)


def export_transformer(
    folder: Path, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, transformer: SD3Transformer2DModel
) -> int:
    """Write the pipeline of the transformer to ``folder``; return the size in bytes."""
    return _save(new_pipeline(vae, clip, tokenizer, transformer), folder)


def _save(pipeline: Any, folder: Path, clip: CLIPModel | None = None, tokenizer: CLIPTokenizer | None = None) -> int:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(temporary)
    if clip is not None and tokenizer is not None:
        clip.half().save_pretrained(temporary / "clip")
        tokenizer.save_pretrained(temporary / "clip")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
