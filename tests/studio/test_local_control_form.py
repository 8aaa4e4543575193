"""What the tab Local control reads, what a run gets from it, and what an image gives back to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from localctl.jobs.prepare import prepare
from localctl.jobs.settings import SampleSettings
from localctl.metrics.edges import canny
from localctl.studio.config import StudioConfig
from localctl.studio.limits import scene as read_scene
from localctl.studio.local_control_actions import FollowHandlers
from localctl.studio.local_control_form import first_regions, mask_of, read_form, read_order
from localctl.studio.local_control_job import EXAMPLE, EXAMPLE_NAME, adapter_places, judge, settings_of
from localctl.studio.local_control_restore import follow_values

pytest_plugins = ["condition_models_here"]

BOX = [0.25, 0.25, 0.75, 1.0]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 90, 90), fill="blue")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def fields(path: Path | None, **changes: Any) -> dict[str, Any]:
    """The fields as the page sends them."""
    regions = [{**first_regions(1)[0], "box": BOX}]
    values = {
        "prompt": "a blue circle", "photo": path and str(path), "source": "a photo", "images": 2, "seed": 7,
        "scene": {"width": 128, "height": 128, "regions": regions}, "low": 50, "high": 100, "cells": 8, "steps": 5,
        "scheduler": "auto", "adapter1": EXAMPLE_NAME, "weight1": 0.5, "start1": 0, "end1": 0.75,
    }  # fmt: skip
    return values | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 200}, "low threshold 200 is above"),
        ({"weight1": float("nan")}, "finite"),
        ({"start1": 0.8}, "start before its end"),
        ({"source": "/etc/passwd"}, "The image must be one of"),
        ({"seed": -1}, "The seed must be from 0"),
        ({"width": 130}, "not a multiple of 8"),
        ({"scene": {"width": 128, "height": 128, "regions": []}}, "1 to 3 masks"),
        ({"photo": "/etc/passwd"}, "The photo"),
    ],
)
def test_fields_out_of_bounds_are_refused(photo: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_form(fields(photo, **changes), StudioConfig())


def test_an_adapter_that_is_not_offered_is_refused(photo: Path, tmp_path: Path) -> None:
    order = read_order(fields(photo, adapter1=str(tmp_path)))
    with pytest.raises(ValueError, match="There is no adapter"):
        settings_of(order, StudioConfig(runs=str(tmp_path)), tmp_path, {})


@pytest.mark.parametrize("high", [100, 300])  # as trained: the photo is the input; else its condition
def test_a_run_gets_the_photo_and_the_mask_and_gives_them_back(photo: Path, tmp_path: Path, high: int) -> None:
    config = StudioConfig(runs=str(tmp_path / "none"))
    form = read_form(fields(photo, high=high, unconditional_scale=0, control_guidance_scale=3), config)
    settings, _ = settings_of(form.order, config, tmp_path, form.sampling)
    job = prepare(SampleSettings(**settings))
    [adapter] = job.adapters
    assert (adapter.weight, adapter.start, adapter.end) == (0.5, 0, 0.75) and job.options.seeds == [7, 8]
    assert adapter.mask[0, 32:, 32:96].min() == 1 and adapter.mask.sum() == 96 * 64
    assert ("image" in settings) == (high == 100)
    values = follow_values(settings, config)
    assert values["source"] == ("a photo" if high == 100 else "a finished condition")
    again = fields(photo, **{name: value for name, value in values.items() if name != "photo"}, high=high)
    assert np.array_equal(np.asarray(read_order(again).follows[0].mask), adapter.mask[0].numpy() * 255)
    assert read_form(again, config).sampling == form.sampling


def test_a_box_is_a_mask_and_nothing_painted_is_everywhere() -> None:
    scene = read_scene({"width": 128, "height": 64, "regions": [{**first_regions(1)[0], "box": BOX}, {"id": "m2"}]})
    mask = mask_of(scene.regions[0], scene)
    assert mask is not None and mask.getbbox() == (32, 16, 96, 64)
    assert mask_of(scene.regions[1], scene) is None


def test_a_copy_is_matched_and_an_empty_image_misses_everything(photo: Path) -> None:
    image = Image.open(photo)
    everywhere = Image.new("L", image.size, 255)
    target = canny(np.asarray(image))
    same, nothing = judge(image, target, [everywhere]), judge(Image.new("RGB", (128, 128)), target, [everywhere])
    assert "F1 inside the mask: 1.00" in same.text and "F1 inside the mask: 0.00" in nothing.text


def test_adapters_with_the_same_last_name_are_told_apart(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("canny/adapter", "palette/adapter", "other")]
    for place in places:
        shutil.copytree(EXAMPLE, place)
    config = StudioConfig(adapter=places, runs=str(tmp_path / "none"))
    assert list(adapter_places(config))[:3] == ["canny/adapter", "palette/adapter", "other"]
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    options = {"image": [str(tmp_path / "photo.png")], "adapter": [places[1]]}
    assert follow_values(options, config)["adapter1"] == "palette/adapter"
    with pytest.raises(ValueError, match="an adapter 'adapter', and this server has"):
        follow_values({**options, "adapter": ["adapter"]}, config)
    with pytest.raises(ValueError, match="'sobel', which this server does not have"):
        follow_values({**options, "adapter": ["sobel"]}, config)


def adapter_of(folder: Path, condition: dict[str, Any]) -> Path:
    """A copy of the example that was trained on another condition."""
    shutil.copytree(EXAMPLE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"condition": condition}))
    return folder


def test_what_a_model_computed_in_training_is_computed_of_the_photo(
    photo: Path, tmp_path: Path, condition_model: Callable[[str], Path]
) -> None:
    trained = {"kind": "depth", "channels": 1, "model": str(condition_model("depth"))}
    config = StudioConfig(adapter=[str(adapter_of(tmp_path / "deep", trained))], runs=str(tmp_path / "none"))
    asked = fields(photo, adapter1="deep", low=10, high=300)  # thresholds are those of canny alone
    form = read_form(asked, config)
    settings, [shown] = settings_of(form.order, config, tmp_path, form.sampling)
    [adapter] = prepare(SampleSettings(**settings)).adapters
    values = np.asarray(shown)[..., 0]
    assert np.array_equal(adapter.condition[0].numpy() * 255, values) and np.ptp(values) == 255
    assert settings.get("condition_model") is None  # the adapter names it

    without = str(adapter_of(tmp_path / "flat", {"kind": "depth", "channels": 1}))
    form = read_form(fields(photo, adapter1="flat"), config)
    with pytest.raises(ValueError, match="flat follows a depth condition, which came with its data"):
        settings_of(form.order, StudioConfig(adapter=[without], runs=""), tmp_path, form.sampling)
    served = StudioConfig(adapter=[without], runs="", condition_model=[f"depth={trained['model']}"])
    settings, [again] = settings_of(form.order, served, tmp_path, form.sampling)
    [adapter] = prepare(SampleSettings(**settings)).adapters
    assert settings["condition_model"] == [trained["model"]] and np.array_equal(np.asarray(again), np.asarray(shown))
    assert np.array_equal(adapter.condition[0].numpy() * 255, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layout": ["scene.json"], "control": ["bias"], "presets": {"bias": ["bias.strength=2.0"]}},
            "made with --layout and --control, which the tab Local",
        ),
        ({"clip_skip": 1}, "made with --clip_skip, which the tab Local control does not have"),
        ({"level_weights": ["1,1,1,0"]}, "--level_weights"),
        ({"prompt_weighting": False}, "--prompt_weighting"),
        ({"condition": ["sobel"]}, "follows a sobel condition with an adapter for canny"),
        ({"prompt": ["a", "b"]}, "and 2 prompts"),
        ({"seeds": [-1]}, "The seed must be from 0"),
        ({"unconditional_scale": [2.0]}, "one value from 0 to 1"),
        ({"controlnet": ["net"], "controlnet_image": ["photo.png"]}, "ControlNet 'net', which this server does not"),
        ({"lora": ["style.safetensors"]}, "LoRA 'style.safetensors', which this server does not have"),
    ],
)
def test_what_the_tab_cannot_show_of_an_image_is_one_sentence(
    photo: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = StudioConfig(runs=str(tmp_path / "none"))
    options = {"adapter": [str(EXAMPLE)], "image": [str(photo)], "prompt": ["a blue circle"], "dtype": "float32"}
    assert follow_values(options, config)["prompt"] == "a blue circle"
    with pytest.raises(ValueError, match=message):
        follow_values({**options, **changes}, config)


def test_another_size_than_the_photos_comes_back(photo: Path, tmp_path: Path) -> None:
    config = StudioConfig(runs=str(tmp_path / "none"))
    options = {"adapter": [str(EXAMPLE)], "image": [str(photo)], "prompt": ["a blue circle"]}
    for height, width in ((128, 128), (64, 192)):
        values = follow_values({**options, "height": height, "width": width}, config)
        again = fields(photo, **{name: value for name, value in values.items() if name != "photo"})
        form = read_form(again, config)
        settings, _ = settings_of(form.order, config, tmp_path, form.sampling)
        assert (settings["height"], settings["width"]) == (height, width)


@pytest.mark.parametrize("scene", ["text", [1], {"regions": 5}])
def test_a_canvas_that_no_page_sends_is_one_sentence_when_an_adapter_is_added(scene: Any) -> None:
    nothing_is_loaded: Any = None
    assert "job-failed" in FollowHandlers(nothing_is_loaded, ["scene"]).change_count(1)(scene)[-1]


def test_a_job_without_an_image_ends_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FollowHandlers, "job", lambda self, request, ask: iter([("0 images", [])]))
    nothing: Any = None
    [(told, _, gallery)] = FollowHandlers(nothing, []).generate(nothing)
    assert told == "0 images" and gallery["visible"] is False
