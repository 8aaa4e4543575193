"""Runs that start from an image, within a mask, or go on at a higher resolution; previews of their steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from addon_files import random_controlnet, save_ip_adapter
from PIL import Image
from sample_helpers import CANNY, PLAIN, assert_same, pixels

from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.cli.sample import parse
from localctl.jobs.generate import StepProgress, generate_job, load_models
from localctl.jobs.prepare import prepare

STEPS = ["--num_inference_steps", "4"]


@pytest.fixture
def photo(base_here: Path) -> np.ndarray:
    """A photo, a mask of its left half, and two layouts that differ in the place of their region."""
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(image).save("photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save("left.png")
    for name, box in (("left", [0, 0, 0.5, 1]), ("right", [0.5, 0, 1, 1])):
        scene = {"prompt": "a b", "regions": [{"phrase": "b", "box": box, "strength": 5}]}
        Path(f"{name}.json").write_text(json.dumps(scene))
    return image


def run(*flags: str, out: str = "out") -> np.ndarray:
    assert sample.main([*flags, "--base", "base", *STEPS, "--output_dir", out]) == 0
    return next(iter(pixels(out).values())).astype(int)


def test_a_region_moves_in_image_to_image(photo: np.ndarray) -> None:
    flags = ["--init_image", "photo.png", "--strength", "0.5"]
    made = {name: run("--layout", f"{name}.json", *flags, out=name) for name in ("left", "right")}
    assert np.abs(made["left"] - made["right"]).mean() > 0
    assert np.abs(made["left"] - run("--prompt", "a b", *flags, out="plain")).mean() > 0
    assert sample.main(["--from_json", "left/00_seed0.png", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("left"))


def test_pixels_outside_the_inpaint_mask_are_those_given(photo: np.ndarray) -> None:
    flags = ["--init_image", "photo.png", "--inpaint_mask", "left.png"]
    made = {name: run("--layout", f"{name}.json", *flags, out=name) for name in ("left", "right")}
    for image in made.values():
        assert np.array_equal(image[:, 32:], photo[:, 32:]) and (image[:, :32] != photo[:, :32]).any()
    assert (made["left"] != made["right"]).any()
    assert json.loads(Path("left/sample.json").read_text())["options"]["strength"] == 1.0
    assert sample.main(["--from_json", "left", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("left"))


def test_a_second_pass_enlarges_the_image_under_the_same_controls(
    photo: np.ndarray, make_adapter: Callable[..., LocalAdapter], sd_folder: Path
) -> None:
    make_adapter(base=str(sd_folder), condition=CANNY).save_pretrained("canny")
    adapter = ["--adapter", "canny", "--image", "photo.png", "--mask", "left.png"]
    flags = ["--upscale", "1.5", "--upscale_strength", "0.5", *adapter]
    made = {name: run("--layout", f"{name}.json", *flags, out=name) for name in ("left", "right")}
    assert made["left"].shape == (96, 96, 3) and np.abs(made["left"] - made["right"]).mean() > 0
    assert np.abs(made["left"] - run("--layout", "left.json", *flags, "--weight", "0", out="off")).mean() > 0
    assert sample.main(["--from_json", "left/00_seed0.png", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("left"))
    job = prepare(parse(["--layout", "left.json", "--base", "base", *STEPS, *flags, "--seeds", "0", "1"]))
    assert job.second is not None and job.second.adapters[0].condition.shape[-2:] == (96, 96)
    seen: list[StepProgress] = []
    list(generate_job(job, load_models(job), seen.append))
    assert [(item.second, item.step, item.of, item.images) for item in seen] == [
        *((False, step, 4, (0, 1)) for step in (1, 2, 3, 4)),
        *((True, step, 2, (0, 1)) for step in (1, 2)),
    ]
    assert [round(item.done, 3) for item in seen] == [0.125, 0.25, 0.375, 0.5, 0.75, 1]


def test_addons_act_from_an_image_within_a_mask_and_in_both_passes(photo: np.ndarray, sd_pipe: Any) -> None:
    random_controlnet(sd_pipe, 0).save_pretrained("net")
    save_ip_adapter(Path("ip"), sd_pipe)
    net = ["--controlnet", "net", "--controlnet_condition_image", "photo.png", "--controlnet_scale", "5"]
    images = ["--ip_adapter", "ip", "--ip_adapter_image", "photo.png", "--ip_adapter_mask", "left.png"]
    start = ["--init_image", "photo.png"]
    for name, flags in {
        "init": start, "mask": [*start, "--inpaint_mask", "left.png"], "large": ["--upscale", "1.5"]
    }.items():  # fmt: skip
        plain = run("--prompt", "a b", *flags, out=name)
        for addon in (net, images):
            assert (run("--prompt", "a b", *flags, *addon, out=f"{name}_{addon[1]}") != plain).any(), (name, addon[1])


def test_previews_of_the_steps_are_written(photo: np.ndarray) -> None:
    flags = [
        "--layout",
        "left.json",
        "--compare",
        "none",
        "bias",
        "--save_steps",
        "2",
        "--upscale",
        "2",
        "--seeds",
        "0",
        "5",
    ]
    run(*flags)
    names = {path.name for path in Path("out/steps").iterdir()}
    assert names == {
        f"00_seed{seed}_{variant}{step}.png"
        for seed in (0, 5)
        for variant in ("none", "bias")
        for step in ("_step002", "_step004", "_upscaled_step002")
    }
    assert Image.open("out/steps/00_seed5_bias_step004.png").size == (64, 64)


def test_images_of_other_sizes_are_followed_and_noted(photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(photo).resize((96, 48)).save("wide.png")
    Image.new("L", (96, 48), 255).save("all.png")
    image = run("--prompt", "a", "--init_image", "wide.png", "--inpaint_mask", "all.png")
    assert image.shape == (48, 96, 3)
    image = run("--prompt", "a", "--init_image", "wide.png", "--resolution", "64", out="square")
    assert (
        image.shape == (64, 64, 3)
        and "wide.png is 96x48 pixels, scaled and cropped to 64x64." in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strength", "0.5"], "--strength needs an image to start from; give --init_image"),
        (["--inpaint_mask", "left.png"], "--inpaint_mask needs an image to start from"),
        (["--init_image", "photo.png", "--strength", "1.5"], "strength must be above 0 and at most 1, not 1.5"),
        (["--init_image", "photo.png", "--strength", "0.2"], "strength of 0.2 leaves no step of 4"),
        (["--init_image", "gone.png"], "gone.png"),
        (["--init_image", "photo.png", "--inpaint_mask", "black.png"], "mask .*black"),
        (
            ["--init_image", "photo.png", "--inpaint_mask", "tall.png"],
            "mask tall.png is 64x128 pixels but the image",
        ),
        (["--upscale", "1"], "--upscale must be above 1 and at most 4, not 1"),
        (["--upscale", "2", "--upscale_strength", "0.1"], "strength of 0.1 leaves no step of 4"),
        (["--upscale_strength", "0.5"], "--upscale_strength is for a second pass; give --upscale"),
        (
            ["--upscale", "2", "--init_image", "photo.png", "--inpaint_mask", "left.png"],
            "--upscale does not go together",
        ),
        (
            ["--upscale", "2", "--guidance_rescale", "0.5"],
            "--guidance_rescale works with --init_image and",
        ),
        (["--upscale", "2", "--upscale_strength", "2"], "--upscale_strength must be above 0 and at most 1, not 2"),
        (["--height", "4096", "--width", "64", "--upscale", "4"], "The upscaled height 16384 is over 8192"),
        (["--save_steps", "0"], "--save_steps must be at least 1, not 0"),
        (["--save_steps", "5"], "--save_steps 5 is more than the 4 steps of this run, .*give at most 4"),
        (["--init_image", "photo.png", "--strength", "0.5", "--save_steps", "3"], "more than the 2 steps of this run"),
        (["--scheduler", "lcm", "--num_inference_steps", "60"], "scheduler lcm takes at most 50 steps, not 60"),
        (["--use_beta_sigmas"], "DDIMScheduler has no beta sigmas"),
        (["--scheduler", "euler", "--use_beta_sigmas", "--use_karras_sigmas"], "one way, not as karras and beta"),
    ],
)
def test_impossible_starts_are_refused_before_the_base_is_loaded(
    photo: np.ndarray, flags: list[str], message: str, assert_refused_early: Callable[[list[str], str], None]
) -> None:
    Image.new("L", (64, 64)).save("black.png")
    Image.new("L", (64, 128), 255).save("tall.png")
    assert_refused_early([*PLAIN, *STEPS, *flags], message)


def test_a_base_for_inpainting_is_refused(photo: np.ndarray, assert_refused_early: Callable[..., None]) -> None:
    shutil.copytree("base", "nine")
    config = json.loads(Path("nine/unet/config.json").read_text())
    Path("nine/unet/config.json").write_text(json.dumps({**config, "in_channels": 9}))
    assert_refused_early(["--prompt", "a", "--base", "nine"], "The base nine reads 9 channels, as bases for inpainting")
    index = json.loads(Path("nine/model_index.json").read_text())  # as published
    Path("nine/model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    told = "(these repaint, too: --init_image and --inpaint_mask)"
    assert_refused_early(["--prompt", "a", "--base", "nine"], told)


def test_optimised_weights_start_from_noise(photo: np.ndarray, assert_refused_early: Callable[..., None]) -> None:
    basic = ["--layout", "left.json", "--base", "base", "--control", "spacetime_optimized", *STEPS]
    assert_refused_early([*basic, "--init_image", "photo.png"], "--init_image does not go together with spacetime_opt")
    assert_refused_early([*basic, "--upscale", "2"], "--upscale does not go together with spacetime_optimized")
