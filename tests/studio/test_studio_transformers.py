"""The studio on transformers: both tabs generate, and what a base would ignore is hidden or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from families import token_adapter
from PIL import Image
from sample_helpers import CANNY
from test_place_form import FIELDS

from localctl.cli.sample import main as sample
from localctl.pipelines import load_pipeline
from localctl.studio import local_control, place
from localctl.studio.config import StudioConfig
from localctl.studio.local_control_form import form_settings, read_form
from localctl.studio.place_form import read_form as read_place
from localctl.studio.place_form import settings_for
from localctl.studio.place_jobs import Shown, Step, run_job
from localctl.studio.place_restore import values_of
from localctl.studio.studio import Studio

pytest_plugins = ["families"]

SCENE: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "regions": [
        {"id": "r1", "color": 0, "phrase": "cat", "box": [0, 0, 0.5, 1]},
        {"id": "r2", "color": 1, "phrase": "dogs", "box": [0.5, 0, 1, 1]},
    ],
}
PLACE = {**FIELDS, "prompt": "a cat, dogs", "scene": SCENE, "steps": 2, "images": 1}
Folders = Callable[[str], Path]


def studio_on(folder: Path, **options: Any) -> Studio:
    return Studio(StudioConfig(base=str(folder), **options))


def reports_of(studio: Studio, settings: Any, folder: Path, heat: bool = False) -> list[Any]:
    reports: list[Any] = []
    run_job(studio, settings, folder, reports.append, lambda: None, heat)
    return reports


@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_a_layout_is_generated_with_heat_maps_and_its_image_repeats(
    family_folders: Folders, tmp_path: Path, name: str
) -> None:
    studio = studio_on(family_folders(name))
    form = read_place({**PLACE, **({"true_cfg_scale": "3"} if name == "qwen_image" else {})}, studio.config)
    (tmp_path / "page").mkdir()
    reports = reports_of(studio, settings_for(form, tmp_path / "page", studio.config), tmp_path / "page", heat=True)
    steps = [item for item in reports if isinstance(item, Step)]
    assert len(steps) == 2 and {len(step.previews) for step in steps} == {1}
    shown = [item for item in reports if isinstance(item, Shown)]
    assert [item.kind for item in shown] == ["image", "heat", "heat"]
    again = tmp_path / "again"
    command = ["--from_json", str(shown[0].path), "--base", str(family_folders(name)), "--output_dir", str(again)]
    assert sample(command) == 0
    images = [np.asarray(Image.open(path)) for path in (shown[0].path, again / shown[0].path.name)]
    assert np.array_equal(*images)


def test_an_adapter_is_followed_inside_its_mask(family_folders: Folders, tmp_path: Path) -> None:
    folder = family_folders("sd3")
    adapter = token_adapter(load_pipeline(str(folder)))
    adapter.register_to_config(base=str(folder), condition=CANNY)
    adapter.save_pretrained(tmp_path / "follows")
    studio = studio_on(folder, adapter=[str(tmp_path / "follows")], runs=str(tmp_path / "runs"))
    cells = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    Image.fromarray(np.kron(cells, np.ones((8, 8, 1))).astype(np.uint8)).save(tmp_path / "photo.png")
    left = {"id": "m1", "color": 0, "phrase": "adapter 1", "box": [0, 0, 0.5, 1]}
    values: dict[str, Any] = {
        **{
            "prompt": "a cat",
            "photo": str(tmp_path / "photo.png"),
            "source": "a photo",
            "low": 20,
            "high": 60,
            "cells": 8,
            "steps": 2,
        },
        **{"scene": {"width": 64, "height": 64, "regions": [left]}, "seed": "1", "images": 1, "scheduler": "auto"},
        **{"adapter1": "follows", "weight1": 1, "start1": 0, "end1": 1, "unconditional_scale": 0},
    }
    images = []
    for weight in (0, 1):
        output = tmp_path / str(weight)
        output.mkdir()
        form = read_form({**values, "weight1": weight}, studio.config)
        settings, _ = form_settings(form, studio.config, output)
        (shown,) = [item for item in reports_of(studio, settings, output) if isinstance(item, Shown)]
        images.append(np.asarray(Image.open(shown.path)))
    assert images[0].shape == (64, 64, 3) and not np.array_equal(*images)


@pytest.mark.parametrize(
    ("name", "hidden", "schedulers"),
    [
        ("sd3", {"guidance_rescale", "true_cfg_scale"}, ["auto", "euler", "heun"]),
        ("flux", {"guidance_rescale", "clip_skip", "control_guidance_scale"}, ["auto", "euler"]),
        (
            "flux2",
            {"guidance_rescale", "clip_skip", "control_guidance_scale", "true_cfg_scale", "negative_prompt"},
            ["auto", "euler"],
        ),
        (
            "qwen_image",
            {"guidance_rescale", "clip_skip", "control_guidance_scale", "guidance_scale"},
            ["auto", "euler"],
        ),
    ],
)
def test_what_a_base_ignores_is_hidden(
    family_folders: Folders, tmp_path: Path, name: str, hidden: set[str], schedulers: list[str]
) -> None:
    studio = studio_on(family_folders(name), runs=str(tmp_path))
    with gr.Blocks():
        layout, follow = place.add(studio), local_control.add(studio)
    for tab in (layout, follow):
        found = {field for field, part in tab.fields.items() if part.visible is False}
        assert found - {"cells"} == hidden & tab.fields.keys()
        assert [value for _, value in tab.fields["scheduler"].choices] == schedulers
    methods = [value for _, value in layout.fields["method"].choices]
    assert "Region bias" in methods and "Space-time, optimised" not in methods


def test_a_u_net_s_page_is_as_before(tmp_path: Path) -> None:
    studio = Studio(StudioConfig(runs=str(tmp_path)))
    with gr.Blocks():
        layout = place.add(studio)
    assert {field for field, part in layout.fields.items() if part.visible is False} == {"true_cfg_scale"}
    assert "Space-time, optimised" in [value for _, value in layout.fields["method"].choices]


def test_the_prompt_is_marked_by_the_tokens_that_are_read(family_folders: Folders) -> None:
    """T5's where a base has it, as many as its pipeline reads."""
    for name, most in (("sd3", 255), ("flux", 511), ("pixart", 299)):
        spans, limit = studio_on(family_folders(name)).tokens("a cat")
        assert ["a cat"[first:last].strip() for first, last in spans] == ["a", "cat"] and limit == most


def test_addons_that_do_not_act_are_refused_before_the_server_starts(family_folders: Folders) -> None:
    with pytest.raises(ValueError, match="A StableDiffusionPipeline takes no max_sequence_length"):
        StudioConfig(max_sequence_length=8).check_places()
    StudioConfig(base=str(family_folders("sd3")), max_sequence_length=512).check_places()
    with pytest.raises(ValueError, match="--max_sequence_length is 513, but a StableDiffusion3Pipeline reads at most"):
        StudioConfig(base=str(family_folders("sd3")), max_sequence_length=513).check_places()
    config = StudioConfig(base=str(family_folders("pixart")), lora=["style.safetensors"])
    with pytest.raises(ValueError, match="--lora: diffusers loads no LoRAs on a PixArtSigmaPipeline; leave it out"):
        config.check_places()


def test_an_image_brings_its_guidance_back(family_folders: Folders) -> None:
    values = values_of({"prompt": ["a cat"], "true_cfg_scale": 3.0}, "micro", (64, 64))
    assert values["true_cfg_scale"] == "3" and values["guidance_scale"] == ""
