"""Image-to-image and inpainting: the layout acts in both, and pixels outside the mask stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localctl.control.region_bias import RegionBias
from localctl.image_to_image import InitImage
from localctl.layout import Layout, Region
from localctl.previews import SamplingStep
from localctl.sampling import generate

LAYOUT = Layout("a b", 64, 64, regions=(Region(phrase="b", box=(0, 0, 0.5, 1)),))
OTHER = Layout("a b", 64, 64, regions=(Region(phrase="b", box=(0.5, 0, 1, 1)),))


def photo(height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def half(height: int = 64, width: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


def distance(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())


@pytest.mark.parametrize("family", ["sd_pipe", "v_pipe", "sdxl_pipe"])
@pytest.mark.parametrize("mask", [None, half()])
def test_regions_act_from_an_image_and_the_pipeline_is_left_as_it_was(
    family: str, mask: torch.Tensor | None, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(family)
    call: dict[str, Any] = {"num_inference_steps": 4, "seeds": (0, 1), "init": InitImage(photo(), 0.5, mask)}
    before = generate(pipe, "a b", seeds=(0,), num_inference_steps=2).images[0]
    scheduler, processors = pipe.scheduler, dict(pipe.unet.attn_processors)
    strong = RegionBias(strength=5)
    here, there = (generate(pipe, layout, strong, **call).images for layout in (LAYOUT, OTHER))
    plain = generate(pipe, LAYOUT, (), **call).images
    assert distance(here[0], there[0]) > 0 and distance(here[0], plain[0]) > 0 and distance(here[0], here[1]) > 0
    alone = generate(pipe, LAYOUT, strong, 1, num_inference_steps=4, init=call["init"]).images[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(here[1], int)).max() <= 2, "independent of the batch"
    assert pipe.scheduler is scheduler and pipe.unet.attn_processors == processors
    assert np.array_equal(before, generate(pipe, "a b", seeds=(0,), num_inference_steps=2).images[0])


def test_pixels_outside_the_mask_stay_exactly(sd_pipe: Any) -> None:
    mask = half()
    mask[..., 32:36] = 0.5
    image = photo()
    made = np.asarray(generate(sd_pipe, "a b", num_inference_steps=3, init=InitImage(image, 1.0, mask)).images[0])
    given = np.asarray(image)
    assert np.array_equal(made[:, 36:], given[:, 36:])
    assert (made[:, :32] != given[:, :32]).any(axis=-1).mean() > 0.9
    assert distance(made[:, 32:36], given[:, 32:36]) < distance(made[:, :32], given[:, :32])


def test_a_mask_thinner_than_a_latent_acts(sd_pipe: Any) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 3:5, 9:60] = 1
    images = [
        np.asarray(generate(sd_pipe, prompt, num_inference_steps=3, init=InitImage(photo(), 1.0, mask)).images[0])
        for prompt in ("a b", "c d e")
    ]
    given, inside = np.asarray(photo()), mask[0].numpy() > 0
    assert all(np.array_equal(image[~inside], given[~inside]) for image in images)
    assert (images[0][inside] != images[1][inside]).any() and (images[0][inside] != given[inside]).any()


def test_strength_sets_the_steps_and_the_distance(sd_pipe: Any) -> None:
    steps: list[SamplingStep] = []
    image = photo()
    made = {}
    for strength, count in ((0.2, 2), (1.0, 10)):
        steps.clear()
        init = InitImage(image, strength)
        made[strength] = generate(sd_pipe, "a b", num_inference_steps=10, init=init, on_step=steps.append).images[0]
        assert [(item.step, item.of) for item in steps] == [(step, count) for step in range(1, count + 1)]
    assert distance(made[0.2], made[1.0]) > 0


def test_images_of_other_sizes_are_scaled_and_cropped(sd_pipe: Any) -> None:
    image = photo(96, 160)
    call: dict[str, Any] = {"num_inference_steps": 2, "init": InitImage(image, 0.5, half(96, 160))}
    made = generate(sd_pipe, Layout("a b", 64, 64), **call).images[0]
    assert made.size == (64, 64)
    assert np.array_equal(np.asarray(made)[:, 40:], np.asarray(call["init"].prepared((64, 64)).image)[:, 40:])
    assert generate(sd_pipe, "a b", num_inference_steps=2, init=InitImage(photo(72, 80))).images[0].size == (80, 72)


def test_impossible_starts_are_refused(sd_pipe: Any) -> None:
    for strength in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
            InitImage(photo(), strength)
    with pytest.raises(ValueError, match=r"strength of 0.1 leaves no step of 3"):
        generate(sd_pipe, "a b", num_inference_steps=3, init=InitImage(photo(), 0.1))
    with pytest.raises(ValueError, match="mask is black everywhere"):
        InitImage(photo(), mask=torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="mask needs an image, not latents"):
        InitImage([torch.zeros(4, 8, 8)], mask=half())
    with pytest.raises(ValueError, match="mask is 32x64 pixels but the image to start from is 64x64, another aspect"):
        generate(sd_pipe, "a b", init=InitImage(photo(), mask=torch.ones(1, 64, 32)))
    with pytest.raises(ValueError, match="Inpainting returns images; leave output_type out"):
        generate(sd_pipe, "a b", init=InitImage(photo(), mask=half()), output_type="np")
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline has no guidance_rescale; leave it out"):
        generate(sd_pipe, "a b", init=InitImage(photo()), guidance_rescale=0.5)
