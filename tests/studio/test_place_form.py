"""The fields of the tab Place become the settings of a run of ``sample.py``, and only what differs is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from localctl.jobs.settings import SampleSettings
from localctl.layout_io import load_layout
from localctl.masks import load_mask
from localctl.studio.addon_restore import addon_values
from localctl.studio.config import StudioConfig
from localctl.studio.methods import METHODS, changed_settings, presets_of, settings_of, shown_presets
from localctl.studio.place_form import read_form, read_sweep, settings_for, sweepable
from localctl.studio.place_restore import values_of
from localctl.studio.restoring import check_bounds

REGION = {"id": "r1", "color": 0, "phrase": "a red circle", "box": [0.0, 0.0, 0.5, 1.0]}
FIELDS: dict[str, Any] = {
    "prompt": "a red circle on gray",
    "scene": {"width": 128, "height": 64, "regions": [REGION]},
    "method": "Region bias",
    "scheduler": "auto",
    "sigmas": "auto",
    "steps": 5,
    "guidance_scale": "",
    "guidance_rescale": 0,
    "clip_skip": 0,
    "seed": 3,
    "images": 2,
    "overlap": "share",
    "photo_use": "Behind the regions",
    "photo_strength": 0.7,
    "upscale": 1,
    "upscale_strength": 0.5,
    "sweep_column": "bias.strength",
    "sweep_columns": "0, 1, 2",
    "sweep_row": "bias.outside_strength",
    "sweep_rows": "0, 2",
}
CONFIG = StudioConfig()


def settings(folder: Path, config: StudioConfig = CONFIG, /, **changes: Any) -> dict[str, Any]:
    made = settings_for(read_form({**FIELDS, **changes}, config), folder, config)
    SampleSettings(**made)  # a field that sample.py does not have is an error
    return {name: value for name, value in made.items() if value is not None}


def test_a_form_is_the_settings_of_a_run(tmp_path: Path) -> None:
    made = settings(tmp_path)
    layout = load_layout(made.pop("layout")[0])
    assert layout.prompt == "a red circle on gray" and layout.size == (64, 128)
    assert made == {
        "base": "micro",
        "dtype": "float32",
        "device": "auto",
        "seeds": [3, 4],
        "num_inference_steps": 5,
        "output_dir": str(tmp_path),
        "control": ["bias"],
    }


def test_what_is_changed_is_set(tmp_path: Path) -> None:
    made = settings(
        tmp_path,
        method="Bias + guidance",
        scheduler="ddim",
        guidance_scale="3.5",
        guidance_rescale=0.5,
        clip_skip=1,
        sigmas="karras",
        negative_prompt="text",
        overlap="first",
        **{"bias.strength": 1.5, "bias.hide_phrases": True, "guidance.sites": "mid/4", "dense.w_self": 0.1},
    )
    assert made["control"] == ["bias", "guidance"]
    assert made["set"] == ["bias.strength=1.5", "bias.hide_phrases=true", "guidance.sites=mid/4"]
    assert (made["scheduler"], made["guidance_scale"], made["guidance_rescale"]) == ("ddim", 3.5, 0.5)
    assert (made["clip_skip"], made["use_karras_sigmas"], made["negative_prompt"]) == (1, True, "text")
    assert load_layout(made["layout"][0]).overlap == "first"


@pytest.mark.parametrize("method", METHODS.values())
def test_the_fields_of_a_method_at_its_presets_set_nothing(method: str) -> None:
    assert changed_settings(method, "micro", shown_presets(method, "micro")) == []
    assert changed_settings(method, "sd15", shown_presets(method, "sd15")) == []


def test_every_setting_of_a_control_has_a_field_but_places_and_tensors() -> None:
    hidden = {"weights", "clip", "early_exit"}
    for control in ("bias", "dense", "guidance", "forward", "spacetime", "spacetime_optimized"):
        shown = {setting.field for setting in settings_of(control)}
        assert shown and not shown & hidden
    assert "spacetime_optimized.clip" not in presets_of("spacetime_optimized", "micro")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias.strength", "2"),
        ("bias.std", "other"),
        ("bias.hide_phrases", 1),
        ("bias.mask_resize", None),
        ("bias.end", 11),
    ],
)
def test_a_setting_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        read_form({**FIELDS, name: value}, CONFIG)


def test_without_regions_the_prompt_alone_is_used(tmp_path: Path) -> None:
    made = settings(tmp_path, scene={"width": 128, "height": 64, "regions": []})
    assert made["prompt"] == ["a red circle on gray"] and (made["height"], made["width"]) == (64, 128)
    assert "control" not in made
    with pytest.raises(ValueError, match="There is no prompt"):
        settings(tmp_path, prompt="", scene={"width": 128, "height": 64, "regions": []})


def test_comparing_names_all_methods_and_needs_regions(tmp_path: Path) -> None:
    form = read_form(FIELDS, CONFIG)
    made = settings_for(form, tmp_path, CONFIG, compare=True)
    assert made["compare"][0] == "none" and "bias" in made["compare"] and "control" not in made
    empty = read_form({**FIELDS, "scene": {"width": 128, "height": 64}}, CONFIG)
    with pytest.raises(ValueError, match="no regions to compare"):
        settings_for(empty, tmp_path, CONFIG, compare=True)


def test_a_sweep_varies_its_two_settings_and_keeps_the_others(tmp_path: Path) -> None:
    fields = {**FIELDS, "images": 1, "bias.strength": 5.0, "bias.end": 0.5}
    form = read_form(fields, CONFIG)
    made = settings_for(form, tmp_path, CONFIG, sweep=read_sweep(fields, form))
    assert made["sweep"] == ["bias.strength=0,1,2", "bias.outside_strength=0,2"]
    assert made["set"] == ["bias.end=0.5"]
    assert sweepable("none") == [] and "bias.strength" in sweepable("bias+guidance")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sweep_columns": "0,1,2,3,4,5,6,7,8"}, "asks for 36 images, more than 16"),
        ({"sweep_row": "bias.strength"}, "the same setting"),
        ({"sweep_column": "dense.w_self"}, "must be one of"),
        ({"method": "None (the prompt alone)"}, "no settings to sweep"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes: dict[str, Any], text: str) -> None:
    fields = {**FIELDS, **changes}
    with pytest.raises(ValueError, match=text):
        read_sweep(fields, read_form(fields, CONFIG))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "upload.jpg"
    Image.fromarray(np.full((64, 128, 3), 90, np.uint8)).save(path)
    return str(path)


def test_a_photo_is_behind_the_regions_or_where_the_run_starts(tmp_path: Path, photo: str) -> None:
    assert "init_image" not in settings(tmp_path, photo=photo)
    made = settings(tmp_path, photo=photo, photo_use="Image to image", photo_strength=0.4)
    assert made["init_image"] == [str(tmp_path / "photo.png")] and made["strength"] == 0.4
    made = settings(tmp_path, photo=photo, photo_use="Repaint the regions")
    mask = load_mask(made["inpaint_mask"][0], (64, 128))
    assert mask[0, :, :64].min() == 1 and mask[0, :, 64:].max() == 0
    with pytest.raises(ValueError, match="no photo to start from"):
        settings(tmp_path, photo_use="Image to image")
    with pytest.raises(ValueError, match="no regions to repaint"):
        empty = {"width": 128, "height": 64, "regions": []}
        settings(tmp_path, photo=photo, photo_use="Repaint the regions", scene=empty)


def test_a_second_pass_is_asked_for_by_its_factor(tmp_path: Path) -> None:
    assert "upscale" not in settings(tmp_path)
    made = settings(tmp_path, upscale=2, upscale_strength=0.3)
    assert (made["upscale"], made["upscale_strength"]) == (2, 0.3)
    with pytest.raises(ValueError, match="The second pass makes 8192x8192 pixels, more than 16,000,000"):
        settings(tmp_path, upscale=4, scene={"width": 2048, "height": 2048, "regions": []})


ADDONS = StudioConfig(controlnet=["a/canny", "b/sobel"], ip_adapter=["c/faces"], lora=["d/style"])


def test_an_addon_acts_once_it_has_an_image(tmp_path: Path, photo: str) -> None:
    made = settings(tmp_path, ADDONS)
    assert "controlnet" not in made and "ip_adapter" not in made
    assert made["lora"] == ["d/style"] and made["lora_scale"] == [1.0]
    made = settings(
        tmp_path,
        ADDONS,
        controlnet1_image=photo,
        controlnet1_condition="sobel",
        controlnet1_scale=0.5,
        controlnet1_where="region 1",
        guess_mode=True,
        ip_adapter0_image=photo,
        lora0_scale=0.25,
    )
    assert made["controlnet"] == ["b/sobel"] and made["controlnet_condition"] == ["sobel"]
    assert made["controlnet_mask"] == ["region:a red circle"] and made["controlnet_scale"] == [0.5]
    assert made["guess_mode"] is True and made["ip_adapter"] == ["c/faces"] and made["lora_scale"] == [0.25]
    assert "ip_adapter_mask" not in made and Path(made["ip_adapter_image"][0]).is_file()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"controlnet0_where": "region 2"}, "no region 2"),
        ({"controlnet0_condition": "hed "}, "must be one of"),
        ({"controlnet0_start": 1, "controlnet0_end": 1}, "a start before its end"),
        ({"controlnet0_scale": 5}, "must be from 0 to 2"),
        ({"controlnet1_condition": "it is the condition"}, "cannot be mixed"),
        ({"controlnet1_condition": "canny", "controlnet1_where": "region 1"}, "masks for all or none"),
    ],
)
def test_an_addon_that_cannot_act_is_refused(tmp_path: Path, photo: str, changes: dict[str, Any], text: str) -> None:
    images = {"controlnet0_image": photo, "controlnet0_condition": "canny"}
    if any(name.startswith("controlnet1") for name in changes):
        images["controlnet1_image"] = photo
    with pytest.raises(ValueError, match=text):
        settings(tmp_path, ADDONS, **{**images, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "Bias + guidance", "bias.strength": 1.5, "bias.hide_phrases": False, "guidance.sites": "mid/4"},
        {"method": "None (the prompt alone)", "sigmas": "beta", "scheduler": "euler", "guidance_scale": "3.5"},
        {"method": "Dense modulation", "dense.w_self": 0.25, "overlap": "last", "clip_skip": 1, "steps": 9},
        {"scene": {"width": 64, "height": 128, "regions": []}, "seed": 7, "images": 3, "negative_prompt": "text"},
        {"photo_use": "Repaint the regions", "photo_strength": 0.9},
        {"upscale": 1.5, "upscale_strength": 0.25, "guidance_rescale": 0.5},
        {"seed": str(2**62 + 1)},  # which a number of a browser would round
    ],
)
def test_the_settings_of_a_run_put_the_fields_back(tmp_path: Path, photo: str, changes: dict[str, Any]) -> None:
    asked = {**FIELDS, "photo": photo, **changes}
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        folder.mkdir()
    made = settings_for(read_form(asked, CONFIG), first, CONFIG)
    recorded = made | {"unconditional_scale": [1.0]}  # as every record has it
    restored = {**FIELDS, **values_of(recorded, "micro", (64, 64))}
    repeated = settings_for(read_form(restored, CONFIG), again, CONFIG)
    if "layout" in made:
        assert load_layout(made.pop("layout")[0]) == load_layout(repeated.pop("layout")[0])
    for name in ("output_dir", "init_image", "inpaint_mask"):
        assert bool(made.pop(name, None)) == bool(repeated.pop(name, None))
    assert made == repeated


def test_an_image_of_weighted_prompts_comes_back_and_one_of_plain_prompts_is_refused() -> None:
    options = {"prompt": ["a (red:1.2) circle"], "prompt_weighting": True}
    assert values_of(options, "micro", (64, 64))["prompt"] == "a (red:1.2) circle"
    with pytest.raises(ValueError, match="made with --prompt_weighting=false, which"):
        values_of({**options, "prompt_weighting": False}, "micro", (64, 64))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "Bias + guidance"},
        {"sweep_column": "bias.outside_strength", "sweep_columns": "0.5, 1", "sweep_row": "none"},
        {"compared": ["None (the prompt alone)", "Bias + dense"]},
    ],
)
def test_an_image_of_a_sweep_or_a_comparison_brings_it_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    def run(fields: dict[str, Any]) -> dict[str, Any]:
        form = read_form(fields, CONFIG)
        sweep = None if "compared" in changes else read_sweep(fields, form)
        made = settings_for(form, tmp_path, CONFIG, compare=sweep is None, sweep=sweep)
        return {name: value for name, value in made.items() if value is not None}

    made = run({**FIELDS, "images": 1, **changes})
    assert made.get("sweep") or made["compare"] == ["none", "bias+dense"]
    others = {name: value for name, value in FIELDS.items() if not name.startswith("sweep")}
    assert run({**others, **values_of(made, "micro", (64, 64))}) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweep": ["bias.std=global,sample"]}, "sweep over 'bias.std', which the page does not have"),
        ({"sweep": ["strength=" + ",".join(map(str, range(17)))]}, "must be 1 to 16 different numbers"),
        ({"compare": ["bias", "none"], "control": None, "set": ["bias.strength=2"]}, "compares methods with --set"),
        ({"init_image": ["photo.png"], "inpaint_mask": ["photo.png"]}, "a mask that is not its regions"),
        ({"level_weights": ["1,1,1,0"]}, "made with --level_weights, which the tab Place does not have"),
    ],
)
def test_a_part_of_a_run_that_the_tab_has_no_field_for_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    made = settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (128, 64), "white").save("photo.png")
    with pytest.raises(ValueError, match=message):
        values_of({**made, **options}, "micro", (64, 64))


def test_a_run_that_the_page_cannot_show_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The run has 2 scenes"):
        values_of({"prompt": ["a", "b"]}, "micro", (64, 64))
    layout = settings(tmp_path)["layout"]
    with pytest.raises(ValueError, match="no method bias\\+forward"):
        values_of({"layout": layout, "control": ["bias", "forward"]}, "micro", (64, 64))


def test_an_odd_record_is_one_sentence(tmp_path: Path) -> None:
    layout = settings(tmp_path)["layout"]
    for text in ("strong", ""):
        odd = {"layout": layout, "control": ["bias"], "set": [f"bias.strength={text}"]}
        with pytest.raises(ValueError, match=rf"sets bias.strength to '{text}', which is no number"):
            values_of(odd, "micro", (64, 64))
    with pytest.raises(ValueError, match=r"3 values for 2 models \(\[0.1, 0.2, 0.3\]\)"):
        addon_values({"lora": ["a", "b"], "lora_scale": [0.1, 0.2, 0.3]}, StudioConfig(lora=["a", "b"]))


def test_an_addon_that_is_there_twice_is_not_taken_for_another() -> None:
    config = StudioConfig(lora=["one/style.safetensors", "two/style.safetensors"], ip_adapter=["ip"])
    options: dict[str, Any] = {"lora": ["two/style.safetensors"], "lora_scale": [0.5]}
    assert [addon_values(options, config)[f"lora{index}_scale"] for index in (0, 1)] == [0, 0.5]
    with pytest.raises(ValueError, match="a LoRA 'style.safetensors', and this server has 2 of that name"):
        addon_values({"lora": ["style.safetensors"]}, config)
    with pytest.raises(ValueError, match="made with one IP-Adapter twice, which the page has once"):
        addon_values({"ip_adapter": ["ip", "ip"], "ip_adapter_image": ["a.png", "b.png"]}, config)


def test_a_number_that_the_page_cannot_show_is_one_sentence() -> None:
    with gr.Blocks():
        fields = {"weight1": gr.Slider(0, 2, label="Strength"), "prompt": gr.Textbox()}
    check_bounds({"weight1": 2, "prompt": "a cat", "scene": {}}, fields)
    with pytest.raises(ValueError, match="made with 2.5 for 'Strength', and the page has 0 to 2; repeat it"):
        check_bounds({"weight1": 2.5}, fields)
