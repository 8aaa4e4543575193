"""ControlNets, IP-Adapters, LoRAs and learned words on both tabs: each acts, and the image brings it back."""

from __future__ import annotations

import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from addon_files import random_controlnet, save_ip_adapter, save_lora, save_word
from PIL import Image
from test_place_form import FIELDS

from localctl.cli.sample import main as sample
from localctl.conditions import extract
from localctl.jobs.prepare import prepare
from localctl.jobs.settings import SampleSettings
from localctl.studio.addon_restore import _images, addon_values
from localctl.studio.config import StudioConfig
from localctl.studio.leaving import bundle_of, settings_of_image
from localctl.studio.local_control_actions import FollowHandlers
from localctl.studio.local_control_form import first_regions
from localctl.studio.local_control_restore import follow_values
from localctl.studio.place_actions import PlaceHandlers
from localctl.studio.place_form import read_form, settings_for
from localctl.studio.place_restore import values_of
from localctl.studio.studio import Studio

pytest_plugins = ["condition_models_here"]

SCENE = {
    "width": 64,
    "height": 64,
    "regions": [{"id": "r1", "color": 0, "phrase": "a cat", "box": [0, 0, 0.5, 1]}],
}
ASKED = {**FIELDS, "prompt": "a cat and dogs", "scene": SCENE, "steps": 2, "images": 1}


@pytest.fixture
def studio(base_here: Path, sd_pipe: Any) -> Iterator[Studio]:
    """A studio on the tiny base, with one addon of each kind."""
    random_controlnet(sd_pipe).save_pretrained("net")
    save_ip_adapter(Path("ip"), sd_pipe)
    save_lora(Path("style.safetensors"), sd_pipe, size=0.3)
    save_word(Path("toy.safetensors"), 16)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    made = Studio(
        StudioConfig(
            base="base",
            controlnet=["net"],
            ip_adapter=["ip"],
            lora=["style.safetensors"],
            textual_inversion=["toy.safetensors"],
        )
    )
    yield made
    made.close()


def generated(studio: Studio, **changes: Any) -> Path:
    """The image that the button Generate shows for these fields."""
    fields = {**ASKED, "lora0_scale": 0.0, **changes}
    request: Any = SimpleNamespace(session_hash="tab")
    told, gallery = list(PlaceHandlers(studio, list(fields)).generate("images")(request, *fields.values()))[-1]
    assert "1 image in" in str(told), told
    return Path(gallery[0][0])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_each_addon_acts_and_the_command_of_the_page_makes_the_same_image(studio: Studio, tmp_path: Path) -> None:
    plain = generated(studio)
    uses: list[dict[str, Any]] = [
        {"controlnet0_image": "photo.png", "controlnet0_condition": "canny", "controlnet0_where": "region 1"},
        {"ip_adapter0_image": "photo.png", "ip_adapter0_where": "region 1", "ip_adapter0_end": 0.9},
        {"lora0_scale": 0.5},
        {"prompt": "a cat and <toy>"},
    ]
    together = {name: value for use in uses for name, value in use.items()}
    images = [generated(studio, **use) for use in (*uses, together)]
    assert all(not np.array_equal(pixels(plain), pixels(image)) for image in images)
    assert np.array_equal(pixels(plain), pixels(generated(studio)))  # nothing of the jobs before is left

    made = bundle_of(images[-1], tmp_path / "bundle")
    with zipfile.ZipFile(made.bundle) as archive:
        archive.extractall(tmp_path)
    assert sample([*shlex.split(made.command)[2:], "--output_dir", "again"]) == 0
    (again,) = Path("again").glob("*_seed3.png")
    assert np.array_equal(pixels(images[-1]), pixels(again))

    options = settings_of_image(images[-1].read_bytes(), tmp_path)  # dropped on the page
    fields = values_of(options, "base", (64, 64)) | addon_values(options, studio.config)
    assert {name for name, value in fields.items() if name.endswith("_where") and value != "region 1"} == set()
    assert np.array_equal(pixels(images[-1]), pixels(generated(studio, **fields)))
    without = settings_of_image(plain.read_bytes(), tmp_path)
    values = addon_values(without, studio.config)
    assert (values["controlnet0_image"], values["ip_adapter0_image"], values["lora0_scale"]) == (None, None, 0)
    for kind, title in {"controlnet": "ControlNet 'net'", "lora": "LoRA 'style.safetensors'"}.items():
        with pytest.raises(ValueError, match=f"made with the {title}, which this server does not have"):
            addon_values(options, replace(studio.config, **dict[str, Any]({kind: []})))


def followed(studio: Studio, **changes: Any) -> Path | str:
    """The image that Generate of the tab Local control makes of these fields, or what is said instead."""
    regions = [{**first_regions(1)[0], "box": [0, 0, 0.5, 1]}]
    fields = {
        "prompt": "a cat and dogs", "photo": "photo.png", "source": "a photo", "images": 1, "seed": "3", "steps": 2,
        "scene": {"width": 64, "height": 64, "regions": regions}, "low": 50, "high": 100, "cells": 8,
        "scheduler": "auto", "adapter1": "follower", "weight1": 1.0, "start1": 0, "end1": 1, "lora0_scale": 0.0,
    } | changes  # fmt: skip
    request: Any = SimpleNamespace(session_hash="tab")
    told = str(list(FollowHandlers(studio, list(fields)).generate(request, *fields.values()))[-1])
    return next(reversed(studio.sessions.of(request).results.values())).path if "1 image in" in told else told


def test_each_addon_acts_beside_an_adapter_and_comes_back(
    studio: Studio, tmp_path: Path, make_adapter: Callable[..., Any]
) -> None:
    condition = {"kind": "canny", "low": 50, "high": 100, "cells": 8, "channels": 1}
    make_adapter(condition=condition, base="base").save_pretrained("follower")
    studio.config = replace(studio.config, adapter=["follower"], runs="none")
    uses: list[dict[str, Any]] = [
        {},
        {"controlnet0_image": "photo.png", "controlnet0_condition": "canny", "controlnet0_where": "mask 1"},
        {"ip_adapter0_image": "photo.png", "ip_adapter0_where": "mask 1", "ip_adapter0_end": 0.9},
        {"lora0_scale": 0.5},
        {"prompt": "a cat and <toy>"},
    ]
    together: dict[str, Any] = {}
    made: list[Path] = []
    for use in uses:  # each beside those before
        together |= use
        image = followed(studio, **together)
        assert isinstance(image, Path), image
        assert not made or not np.array_equal(pixels(made[-1]), pixels(image)), use
        made.append(image)

    options = settings_of_image(made[-1].read_bytes(), tmp_path)  # dropped on the page
    values = follow_values(options, studio.config)
    assert (values["controlnet0_where"], values["ip_adapter0_where"], values["lora0_scale"]) == (
        "mask 1",
        "mask 1",
        0.5,
    )
    values["photo"].save("again.png")
    again = followed(studio, **{**values, "photo": "again.png"})
    assert isinstance(again, Path) and np.array_equal(pixels(made[-1]), pixels(again))
    assert "There is no mask 3 for an addon" in str(followed(studio, **{**together, "controlnet0_where": "mask 3"}))


def test_models_of_conditions_and_the_image_encoder_are_those_of_the_server(
    studio: Studio, tmp_path: Path, condition_model: Callable[[str], Path]
) -> None:
    shutil.copytree("net", "second")
    Path("ip/image_encoder").rename("eyes")
    models = [f"depth={condition_model('depth')}", f"pose={condition_model('pose')}"]
    config = replace(
        studio.config,
        controlnet=["net", "second"],
        ip_adapter_encoder="eyes",
        condition_model=models,
        condition_detector=str(condition_model("detector")),
    )
    config.check_places()
    with pytest.raises(ValueError, match="give the image encoder"):
        studio.config.check_places()
    used = {"ip_adapter0_image": "photo.png", "lora0_scale": 0, **{f"controlnet{i}_image": "photo.png" for i in (0, 1)}}
    kinds = {"controlnet0_condition": "canny", "controlnet1_condition": "depth"}
    settings = settings_for(read_form({**ASKED, **used, **kinds}, config), tmp_path, config)
    assert settings["controlnet_condition_detector"] is None
    edges, depth = prepare(SampleSettings(**settings)).addons.controlnets
    photo = np.asarray(Image.open("photo.png"))
    assert np.array_equal(depth.condition[:1], extract(config.computed("depth"), photo))
    assert not np.array_equal(depth.condition, edges.condition)
    assert _images("controlnet", settings, config, "region")["controlnet1_condition"] == "depth"
    with pytest.raises(ValueError, match="start it with --condition_model depth=PLACE"):
        _images("controlnet", settings, replace(config, condition_model=models[1:]), "region")
    with pytest.raises(ValueError, match="must be one of it is the condition, canny, sobel, palette"):
        read_form({**ASKED, **used, **kinds}, replace(config, condition_model=models[1:]))
