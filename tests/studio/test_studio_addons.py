"""ControlNets, IP-Adapters, LoRAs and learned words on the tab Place: each acts, and the image repeats it."""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Iterator
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
from localctl.studio.config import StudioConfig
from localctl.studio.leaving import bundle_of, settings_of_image
from localctl.studio.place_actions import generate
from localctl.studio.place_restore import addon_values, values_of
from localctl.studio.studio import Studio

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
    told, gallery = list(generate(studio, list(fields), "images")(request, *fields.values()))[-1]
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
