"""``generate`` on FLUX, Qwen-Image and Z-Image: previews, latents to start from, settings that a pipeline lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES, PROMPT, SIDE, frozen

from localctl.image_to_image import InitImage
from localctl.previews import LatentPreview
from localctl.sampling import generate

pytest_plugins = ["families"]
NAMES = ("flux", "flux2", "qwen_image", "z_image")


@pytest.fixture
def load(family_folders: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda name: frozen(diffusers.DiffusionPipeline.from_pretrained(family_folders(name)))


@pytest.mark.parametrize("name", NAMES)
def test_the_preview_of_the_last_step_is_the_image(load: Any, name: str) -> None:
    """By a small VAE, also one for videos, or of patches with a norm of their own."""
    shown: list[Any] = []
    pipe, size = load(name), {"height": SIDE, "width": 2 * SIDE}
    options = {**FAMILIES[name].call, "num_inference_steps": 2, **size}
    (image,) = generate(pipe, PROMPT, [], seeds=1, on_step=shown.append, **options).images
    (preview,) = LatentPreview(pipe)(shown[-1].latents)
    assert np.abs(np.asarray(preview).astype(int) - np.asarray(image)).max() <= 2


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_latents_to_start_from_are_told_from_pixels(load: Any, name: str) -> None:
    """By their channels, of which real bases have 16."""
    pipe, latents = load(name), torch.randn(1, 16, 4, 4)
    pipe.vae.register_to_config(latent_channels=16)
    other: Any = InitImage(list(latents), 0.5).pipeline(pipe)
    assert torch.equal(other.image_processor.preprocess(latents), latents)


def test_a_setting_that_a_pipeline_does_not_take_is_refused(load: Any, sd_pipe: Any) -> None:
    with pytest.raises(ValueError, match="A ZImagePipeline takes no true_cfg_scale; leave it out"):
        generate(load("z_image"), PROMPT, [], seeds=1, true_cfg_scale=2.0, height=SIDE, width=SIDE)
    with pytest.raises(ValueError, match="A StableDiffusionPipeline takes no max_sequence_length; leave it out"):
        generate(sd_pipe, PROMPT, [], seeds=1, max_sequence_length=8)
