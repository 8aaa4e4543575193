"""Optimising the weights of space-time attention: the objective, the descent, and a pipeline left as it was."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attachment_helpers import LAYOUT, PROMPT, draw, processors
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from localctl.control.attach import attach
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout, Region
from localctl.metrics.clip import CLIP_MEAN, Clip, CLIPScore
from localctl.metrics.extractors import MICRO_CLIP
from localctl.pipelines import set_scheduler
from localctl.sampling import generate
from localctl.weight_search.objective import ClipObjective, object_text
from localctl.weight_search.weights import OptimizedSpaceTime, find_clip, generate_optimized, optimize_weights

STEPS = 3


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(MICRO_CLIP)


def test_pixels_are_embedded_as_pictures(clip: Clip, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(picture).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(clip.embed_pixels(pixels), clip.embed_images(picture), rtol=0, atol=1e-4)
    assert clip.mean == CLIP_MEAN
    other = Path(shutil.copytree(MICRO_CLIP, tmp_path / "clip"))
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    told = Clip(other)
    assert told.mean == (0.1, 0.2, 0.3)
    assert not torch.allclose(told.embed_images(picture), clip.embed_images(picture), atol=1e-2)


def test_the_objective_is_one_score_and_five_times_those_of_the_crops(clip: Clip) -> None:
    layout = Layout("a red circle", regions=(Region("red circle", (0.25, 0, 0.75, 0.5)), Region(box=(0, 0, 1, 1))))
    picture = np.random.default_rng(0).integers(64, 192, (64, 64, 3), dtype=np.uint8)
    score = CLIPScore(clip)
    score.update(picture, "a red circle")
    score.update(picture[:32, 16:48], "A photo of red circle")
    whole, crop = (1 - score.per_sample()[:, 0] / 100).tolist()
    pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255).requires_grad_()
    loss = ClipObjective(clip, layout, (64, 64))(pixels)
    assert float(loss.detach()) == pytest.approx(whole + 5 * crop, abs=1e-4)
    loss.backward()
    assert pixels.grad is not None
    step = 1e-3 * pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        objective = ClipObjective(clip, layout, (64, 64))
        change = float(objective(pixels + 5 * step) - objective(pixels - 5 * step)) / 10
    assert change == pytest.approx(float((pixels.grad * step).sum()), rel=0.05)
    assert object_text(Region("The Silver bed", (0, 0, 1, 1))) == "A photo of Silver bed"
    assert float(ClipObjective(clip, layout, (64, 64), region_factor=0)(pixels).detach()) == pytest.approx(
        whole, abs=1e-4
    )


def test_pixels_may_be_shown_as_the_published_code_does(clip: Clip) -> None:
    """In [0, 1], neither mean nor deviation taken off."""
    layout = Layout("a red circle", regions=(Region("red circle", (0.25, 0, 0.75, 0.5)),))
    pixels = torch.rand(1, 3, clip.side, clip.side, generator=torch.Generator().manual_seed(0))
    raw, usual = (ClipObjective(clip, layout, (clip.side,) * 2, 0.0, normalise) for normalise in (False, True))
    seen = clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output)
    text = clip.embed_texts(["a red circle"])
    expected = 1 - torch.nn.functional.cosine_similarity(seen, text)
    torch.testing.assert_close(raw(pixels), expected[0], rtol=1e-5, atol=1e-6)
    assert (raw(pixels) - usual(pixels)).abs() > 1e-4
    assert OptimizedSpaceTime().normalise_pixels


@pytest.mark.parametrize("mix", ["convex", "released"])
def test_the_loss_falls_and_the_pipeline_is_left_as_it_was(
    sd_pipe: StableDiffusionPipeline, clip: Clip, mix: str
) -> None:
    before, plain, scheduler = processors(sd_pipe), draw(sd_pipe), sd_pipe.scheduler
    sd_pipe.unet.requires_grad_(True)
    control = OptimizedSpaceTime(epochs=3, learning_rate=0.1, mix=mix, weight=0.95 if mix == "convex" else None)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 2, "progress": False}
    found = optimize_weights(sd_pipe, LAYOUT, clip, control, **options)
    assert found.weights.shape == (STEPS, 2) and len(found.losses) == 3
    start = control.step_weights(LAYOUT, STEPS)
    assert bool((found.weights != start).all()) and min(found.losses[1:]) < found.losses[0]
    if mix == "convex":
        assert float(found.weights.min()) >= 0 and float(found.weights.max()) <= 1
    sd_pipe.unet.enable_gradient_checkpointing()
    once = optimize_weights(sd_pipe, LAYOUT, clip, OptimizedSpaceTime(epochs=1, mix=mix, weight=0.5), **options)
    torch.testing.assert_close((once.weights - 0.5).abs(), torch.full((STEPS, 2), 0.005), rtol=1e-3, atol=0)
    after = processors(sd_pipe)
    assert sd_pipe.unet.is_gradient_checkpointing
    assert sd_pipe.scheduler is scheduler and all(after[name] is before[name] for name in before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in sd_pipe.unet.parameters())
    sd_pipe.unet.requires_grad_(False)
    assert torch.equal(draw(sd_pipe), plain)


@pytest.mark.parametrize("scheduler", [pytest.param("pndm", marks=pytest.mark.slow), "euler"])
def test_drawing_is_an_ordinary_run_with_the_weights(
    sd_pipe: StableDiffusionPipeline, clip: Clip, scheduler: str
) -> None:
    set_scheduler(sd_pipe, scheduler)
    bias = RegionBias()
    control = OptimizedSpaceTime(epochs=1, learning_rate=0.3, clip=str(MICRO_CLIP), last_steps=2, end=0.9)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    drawn = generate_optimized(sd_pipe, LAYOUT, [bias, control], [3, 4], progress=False, **call)
    assert drawn.seeds == (3, 4) and drawn.layouts == (LAYOUT, LAYOUT)
    found = optimize_weights(sd_pipe, LAYOUT, clip, control, seed=4, controls=[bias], progress=False, **call)
    assert torch.equal(found.weights[0], torch.tensor([0.5, 0.5])) and not torch.equal(
        found.weights[1], found.weights[0]
    )
    final = generate(sd_pipe, LAYOUT, [bias, SpaceTimeAttention(weights=found.weights, end=0.9)], 4, **call)
    assert np.array_equal(np.asarray(final.images[0]), np.asarray(drawn.images[1]))
    if scheduler == "euler":
        assert isinstance(sd_pipe.scheduler, EulerDiscreteScheduler)


def test_bad_input_is_one_sentence(sd_pipe: StableDiffusionPipeline, clip: Clip) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "progress": False}
    for options, message in (
        ({"epochs": 0}, "at least 1 epoch"),
        ({"last_steps": -1}, "at least 0 last_steps"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight": 3.0}, "convex mix"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimizedSpaceTime(**options)
    with pytest.raises(ValueError, match="no weights yet"), _attached(sd_pipe, OptimizedSpaceTime()):
        pass
    with pytest.raises(ValueError, match="0 controls to optimise"):
        generate_optimized(sd_pipe, LAYOUT, [RegionBias()], **call)
    with pytest.raises(ValueError, match="No region of the layout"):
        optimize_weights(sd_pipe, Layout(PROMPT), clip, **call)
    with pytest.raises(ValueError, match="leave LayoutGuidance out"):
        optimize_weights(sd_pipe, LAYOUT, clip, controls=[LayoutGuidance()], **call)
    broken = copy.deepcopy(sd_pipe)
    broken.unet.conv_out.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        optimize_weights(broken, LAYOUT, clip, **call)
    with pytest.raises(ValueError, match="There is no CLIP at nowhere"):
        find_clip("nowhere", sd_pipe)


def _attached(pipe: Any, control: Any) -> Any:
    return attach(pipe, LAYOUT, control)


def test_the_clip_of_the_base_is_found_by_itself(sd_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd_folder, tmp_path / "base"))
    shutil.copytree(MICRO_CLIP, folder / "clip")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert Path(find_clip("auto", pipe).folder) == folder / "clip"
