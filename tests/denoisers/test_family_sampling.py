"""``generate`` on FLUX, Qwen-Image and Z-Image: previews, latents to start from, settings that a pipeline lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES, PROMPT, SIDE, frozen

from localctl.denoisers import family_of
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


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image"])
def test_the_most_tokens_of_a_prompt_are_those_that_the_pipeline_checks(load: Any, name: str) -> None:
    pipe = load(name)
    most = family_of(pipe.transformer.config).text_limit(pipe.transformer.config)
    with pytest.raises(ValueError, match=f"`max_sequence_length` cannot be greater than {most} but is {most + 1}"):
        pipe(PROMPT, height=SIDE, width=SIDE, max_sequence_length=most + 1)
    with pytest.raises(ValueError, match=f"^max_sequence_length is {most + 1}, but a {type(pipe).__name__} reads at"):
        generate(pipe, PROMPT, [], seeds=1, max_sequence_length=most + 1)


def test_z_image_reads_as_many_tokens_as_it_has_places_for(load: Any) -> None:
    transformer = load("z_image").transformer
    config = transformer.config
    image, most = torch.zeros(config.in_channels, 1, 4, 4), family_of(config).text_limit(config)
    texts = [torch.zeros(length, config.cap_feat_dim) for length in (most, most + 1)]
    assert transformer([image], torch.ones(1), texts[:1])[0][0].shape == image.shape
    with pytest.raises(IndexError, match="out of bounds"):
        transformer([image], torch.ones(1), texts[1:])
