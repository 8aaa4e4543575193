"""The shipped weights: an ordinary diffusers folder, small, and drawing something that depends on the caption."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from localctl.bases import MICRO_WEIGHTS
from localctl.diffusion import round_trip
from localctl.micro.scenes import scene
from research.micro_base.clip import retrieval_top1
from research.micro_base.measure import vae_figures

LIMIT = 40 * 10**6


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """Loaded by diffusers alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(MICRO_WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_folder_is_small_and_fp16_safetensors() -> None:
    files = [f for f in MICRO_WEIGHTS.rglob("*") if f.is_file()]
    assert 0 < sum(f.stat().st_size for f in files) <= LIMIT
    assert {f.suffix for f in files} <= {".json", ".safetensors"}


def test_a_named_background_is_drawn(pipe: StableDiffusionPipeline) -> None:
    levels = {}
    for name in ("white", "black"):
        generator = torch.Generator().manual_seed(0)
        prompt = f"a red circle on a {name} background"
        picture = pipe(prompt, num_inference_steps=12, guidance_scale=2.0, generator=generator).images[0]
        levels[name] = np.median(np.asarray(picture))
    assert levels["white"] > 180 and levels["black"] < 75


def test_the_round_trip_keeps_pictures(pipe: StableDiffusionPipeline) -> None:
    images = np.stack([scene(i, "basic", "test").image for i in range(12)])
    psnr, f1 = vae_figures(images, round_trip(pipe.vae, images))
    assert psnr.value > 29 and f1.value > 0.85


def test_the_clip_tells_captions_apart() -> None:
    scenes = [scene(i, "basic", "test") for i in range(64)]
    clip = CLIPModel.from_pretrained(MICRO_WEIGHTS / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "clip")
    images, captions = np.stack([s.image for s in scenes]), [s.caption for s in scenes]
    assert retrieval_top1(clip, tokenizer, images, captions) > 0.6
    assert retrieval_top1(clip, tokenizer, images, captions[1:] + captions[:1]) < 0.1
