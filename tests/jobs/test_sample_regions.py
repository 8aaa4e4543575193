"""``sample.py`` with layouts: controls, sweeps, comparisons, and the record of all of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_helpers import assert_same, pixels

import localctl
import localctl.pipelines
from localctl.cli import sample
from localctl.cli.sample import parse
from localctl.control.dense import DenseModulation
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.presets import PRESETS
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.jobs.files import save_record
from localctl.jobs.prepare import Job, prepare, reproducing_options
from localctl.jobs.sheets import verdict
from localctl.jobs.variants import COMPARED_ALL, make_controls
from localctl.layout import Layout, Region
from localctl.layout_io import load_layout, save_layout
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.sampling import Sampling, generate
from localctl.weight_search.weights import OptimizedSpaceTime, optimize_weights

SCENE: dict[str, Any] = {
    "prompt": "a cat, dogs",
    "height": 64,
    "width": 64,
    "regions": [{"phrase": "cat", "box": [0, 0, 0.5, 1]}, {"phrase": "dogs", "mask": "dogs.png"}],
}

SCENE_FILE = Path(__file__).parents[2] / "examples" / "scene.json"


@pytest.fixture
def workspace(base_here: Path) -> Path:
    mask = np.zeros((16, 16), np.uint8)
    mask[4:, 8:] = 255
    Image.fromarray(mask).save("dogs.png")
    Path("scene.json").write_text(json.dumps(SCENE))
    Path("foreign.json").write_text(json.dumps({**SCENE, "prompt": "a cow"}))
    Path("reversed.json").write_text(json.dumps({**SCENE, "regions": [{"phrase": "cat", "box": [0.5, 0, 0.1, 1]}]}))
    Path("photo.png").write_bytes(Path("dogs.png").read_bytes())
    return base_here


BASIC = ["--layout", "scene.json", "--base", "base", "--num_inference_steps", "2"]


def test_the_images_are_the_same_as_from_generate(workspace: Path) -> None:
    controls = ["--control", "bias", "guidance", "--set", "strength=2", "guidance.scale=40", "iterations=1"]
    assert sample.main([*BASIC, *controls, "--seeds", "3", "--output_dir", "out"]) == 0
    pipe = localctl.pipelines.load_pipeline("base")
    expected = [RegionBias(strength=2.0), LayoutGuidance(scale=40.0, iterations=1)]
    images = generate(pipe, load_layout("scene.json"), expected, 3, num_inference_steps=2, guidance_scale=7.5).images
    assert_same(pixels("out"), {"00_seed3.png": np.asarray(images[0])})
    plain = generate(pipe, load_layout("scene.json"), (), 3, num_inference_steps=2, guidance_scale=7.5).images
    assert not np.array_equal(np.asarray(plain[0]), np.asarray(images[0]))


@pytest.mark.parametrize("control", ["none", "bias", "bias+guidance"])
def test_python_and_command_line_give_the_same_image(control: str, workspace: Path) -> None:
    flags = ["--layout", str(SCENE_FILE), "--control", control, "--num_inference_steps", "3", "--seeds", "4"]
    assert sample.main([*flags, "--output_dir", "out"]) == 0
    pipe, controls = localctl.load_pipeline("micro"), localctl.controls(control, base="micro")
    how = localctl.sampling_of(control, base="micro")
    images = localctl.generate(
        pipe, localctl.load_layout(SCENE_FILE), controls, seeds=4, sampling=how, num_inference_steps=3
    ).images
    assert_same(pixels("out"), {"00_seed4.png": np.asarray(images[0])})


def test_a_comparison_generates_with_every_control_and_its_record_repeats_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = ["--compare", "none", "bias", "bias+dense", "--seeds", "1", "2", "--set", "strength=4"]
    assert sample.main([*BASIC, *compare, "--output_dir", "out"]) == 0
    images = pixels("out")
    names = [f"00_seed{seed}_{label}.png" for seed in (1, 2) for label in ("bias+dense", "bias", "none")]
    assert sorted(images) == sorted(names)
    assert all((images[a] != images[b]).any() for i, a in enumerate(names) for b in names[:i])
    sheet = Image.open("out/compare.png")
    assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    shutil.move("out", "moved")
    Path("scene.json").unlink()
    Path("dogs.png").unlink()  # the record must not need them
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    assert sample.main(["--from_json", "../moved/sample.json", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), images)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "flags",
    [
        "--control bias guidance --set bias.strength=1.5",
        "--compare none bias bias+guidance spacetime",
        "--sweep strength=0,1.5 outside_strength=0,.5",
    ],
)
def test_a_record_holds_the_presets_that_acted(
    flags: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a later version has none or, where a setting had no value, has some."""

    def job(argv: list[str], known: bool) -> Job:
        with monkeypatch.context() as patch:
            for name in () if known else ("PRESETS", "BESIDE", "SAMPLING"):
                patch.setattr(f"localctl.control.presets.{name}", {})
            return prepare(parse(argv))

    then = job(["--layout", str(SCENE_FILE), *flags.split()], known)
    save_record(reproducing_options(then), [], tmp_path)
    now = job(["--from_json", str(tmp_path)], not known)
    acting = [
        [(one.label, one.controls, Sampling.of(job.options).over(one.sampling).over(job.own)) for one in job.variants]
        for job in (then, now)
    ]
    assert acting[0] == acting[1]
    assert now.options.presets == then.options.presets and "bias.strength=1.5" not in str(now.options.presets)


def test_a_setting_that_may_be_absent_is_set_to_none() -> None:
    (control,) = make_controls(["spacetime"], [("weight", "none")], "micro")
    assert control == SpaceTimeAttention(**{**PRESETS["micro"]["spacetime"], "weight": None})
    with pytest.raises(ValueError, match="end must be a number, not 'none'"):
        make_controls(["spacetime"], [("end", "none")], "micro")


def test_presets_of_a_record_are_checked_and_give_way_to_another_control(tmp_path: Path) -> None:
    options = {"layout": [str(SCENE_FILE)], "presets": {"bias": ["bias.strength=much"]}}
    save_record(options, [], tmp_path)
    with pytest.raises(ValueError, match=r"bias.strength must be a number, not 'much'"):
        prepare(parse(["--from_json", str(tmp_path)]))
    save_record({**options, "presets": {"bias": ["bias.power=1"]}}, [], tmp_path)
    with pytest.raises(ValueError, match=r"No control of this run has a setting 'bias.power'"):
        prepare(parse(["--from_json", str(tmp_path)]))
    for flags in (["--control", "bias"], ["--base", "sd15"]):
        assert prepare(parse(["--from_json", str(tmp_path), *flags])).options.presets


def test_the_negative_prompt_of_a_region_acts_and_not_in_records_of_before(
    workspace: Path, assert_refused_early: Callable[[list[str], str], None]
) -> None:
    regions = [{**SCENE["regions"][0], "negative_prompt": "dogs"}, SCENE["regions"][1]]
    Path("scene.json").write_text(json.dumps({**SCENE, "regions": regions}))
    assert sample.main([*BASIC, "--compare", "bias", "none", "--seeds", "3", "--output_dir", "out"]) == 0
    pipe, made = localctl.pipelines.load_pipeline("base"), pixels("out")

    def images(*controls: Any) -> Any:
        call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5}
        return np.asarray(generate(pipe, load_layout("scene.json"), controls, 3, **call).images[0])

    avoiding, earlier, plain = images(RegionBias(), NegativePrompts()), images(RegionBias()), images()
    assert not np.array_equal(avoiding, earlier)
    assert_same(made, {"00_seed3_bias.png": avoiding, "00_seed3_none.png": plain})
    assert sample.main(["--from_json", "out/sample.json", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), made)

    record = json.loads(Path("out/sample.json").read_text())
    del record["options"]["region_negatives"]  # as earlier versions wrote it
    Path("out/sample.json").write_text(json.dumps(record))
    assert sample.main(["--from_json", "out/sample.json", "--output_dir", "before"]) == 0
    assert_same(pixels("before"), {"00_seed3_bias.png": earlier, "00_seed3_none.png": plain})
    assert parse(["--from_json", "out/sample.json", "--layout", "scene.json"]).region_negatives is True  # a new layout
    job = prepare(parse([*BASIC, "--region_negatives", "false"]))
    assert job.notes == ["Negative prompts of regions do nothing with --region_negatives false."]
    unguided = "Negative prompts of regions do nothing without guidance; give a --guidance_scale above 1, or leave them"
    assert_refused_early([*BASIC, "--guidance_scale", "1"], unguided)
    assert prepare(parse([*BASIC, "--guidance_scale", "1", "--control", "none"])).notes == []


def test_a_sweep_is_a_labelled_grid_with_nothing_at_zero(workspace: Path) -> None:
    sweep = ["--control", "bias", "--sweep", "strength=0,4", "outside_strength=0,.5,1"]
    assert sample.main([*BASIC, *sweep, "--output_dir", "out"]) == 0
    images = pixels("out")
    sheet = images.pop("00_seed0_sweep.png")
    assert sheet.shape[1] > 2 * 256 and 3 * 256 < sheet.shape[0] < 4 * 256 and len(images) == 6
    assert sample.main([*BASIC, "--control", "none", "--output_dir", "plain"]) == 0
    plain = pixels("plain")["00_seed0.png"]
    for name, image in images.items():
        assert np.array_equal(image, plain) == ("_strength=0_outside_strength=0.png" in name)


def test_optimised_weights_from_the_command_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--control", "bias", "spacetime_optimized", "--set", "epochs=1", f"clip={MICRO_CLIP}", "learning_rate=.2"]
    assert sample.main([*BASIC, *flags, "--seeds", "3", "--output_dir", "out"]) == 0
    pipe = localctl.pipelines.load_pipeline("base")
    control = OptimizedSpaceTime(epochs=1, learning_rate=0.2)
    layout, call = load_layout("scene.json"), {"num_inference_steps": 2, "guidance_scale": 7.5}
    found = optimize_weights(pipe, layout, Clip(MICRO_CLIP), control, seed=3, controls=[RegionBias()], **call)
    expected = generate(pipe, layout, [RegionBias(), SpaceTimeAttention(weights=found.weights)], 3, **call).images
    assert_same(pixels("out"), {"00_seed3.png": np.asarray(expected[0])})


def test_the_plan_of_a_sweep_and_of_compare_all(workspace: Path) -> None:
    job = prepare(parse([*BASIC, "--sweep", "strength=0,.3,.6", "outside_strength=0,.2"]))
    places = {(item.column, item.row): item.controls for item in job.variants}
    assert places[2, 1] == (RegionBias(strength=0.6, outside_strength=0.2),) and len(places) == 6
    everything = prepare(parse([*BASIC, "--compare", "all"])).variants
    assert [item.label for item in everything] == ["none", "bias", "dense", "guidance"]
    for words in (("all", "bias"), ("bias+dense", "all"), ("guidance", "all", "none")):
        labels = [item.label for item in prepare(parse([*BASIC, "--compare", *words])).variants]
        named = [word for word in words if word != "all"]
        assert len(labels) == len(set(labels)) and set(labels) == {*named, *COMPARED_ALL}, words
        assert labels[0] == ("none" if words[0] == "all" else words[0])
    assert [item.controls for item in everything][:3] == [(), (RegionBias(),), (DenseModulation(),)]
    tuned = prepare(parse(["--layout", "scene.json", "--control", "guidance", "--set", "sites=up/2,mid"])).variants
    assert tuned[0].controls == (LayoutGuidance(**{**PRESETS["micro"]["guidance"], "sites": ("up/2", "mid")}),)
    mixed = ["--control", "spacetime", "--set", "weight=0.7", "spacetime.schedule=linear", "mix=released"]
    expected = SpaceTimeAttention(weight=0.7, schedule="linear", mix="released")
    assert prepare(parse([*BASIC, *mixed])).variants[0].controls == (expected,)
    assert prepare(parse([*BASIC, "--control", "none"])).variants[0].controls == ()


def test_the_embedded_base_is_sampled_as_suits_the_controls(workspace: Path) -> None:
    """Which flags override, and the record holds where all variants share it."""

    def planned(*flags: str) -> tuple[Any, dict[str, Any]]:
        job = prepare(parse(["--layout", "scene.json", *flags]))
        ways = {item.label: (item.sampling.scheduler, item.sampling.guidance_scale) for item in job.variants}
        return ways, {name: getattr(job.options, name) for name in ("scheduler", "guidance_scale")}

    ways, recorded = planned("--compare", "none", "bias", "bias+dense", "guidance+bias", "bias+forward")
    own, free = ("ddpm", 4.0), (None, None)
    assert ways == {"none": free, "bias": own, "bias+dense": own, "guidance+bias": own, "bias+forward": own}
    assert recorded == {"scheduler": None, "guidance_scale": None}
    assert planned("--control", "bias")[1] == {"scheduler": "ddpm", "guidance_scale": 4.0}
    assert planned("--control", "none")[1] == {"scheduler": None, "guidance_scale": 2.0}
    assert planned("--control", "bias", "--guidance_scale", "3")[1] == {"scheduler": "ddpm", "guidance_scale": 3.0}
    assert planned("--control", "bias", "--base", "base")[1] == {"scheduler": None, "guidance_scale": 7.5}

    together = prepare(parse(["--layout", "scene.json", "--control", "bias", "guidance"])).variants[0].controls
    presets = PRESETS["micro"]
    assert together == (RegionBias(**{**presets["bias"], "start": 0.6}), LayoutGuidance(**presets["guidance"]))
    later = ["--control", "bias", "guidance", "--set", "bias.start=0.8"]
    assert prepare(parse(["--layout", "scene.json", *later])).variants[0].controls[0] == RegionBias(
        **{**presets["bias"], "start": 0.8}
    )


def test_each_variant_of_a_comparison_has_its_own_sampling(workspace: Path) -> None:
    Path("micro.json").write_text(json.dumps({**SCENE, "regions": SCENE["regions"][:1]}))
    flags = ["--layout", "micro.json", "--num_inference_steps", "2"]
    assert sample.main([*flags, "--compare", "bias", "none", "--output_dir", "out"]) == 0
    pipe, layout = localctl.pipelines.load_pipeline("micro"), load_layout("micro.json")
    plain = generate(pipe, layout, (), 0, num_inference_steps=2, guidance_scale=2.0).images[0]
    localctl.pipelines.set_scheduler(pipe, "ddpm")
    control = RegionBias(**PRESETS["micro"]["bias"])
    image = generate(pipe, layout, control, 0, num_inference_steps=2, guidance_scale=4.0).images[0]
    expected = {"00_seed0_none.png": np.asarray(plain), "00_seed0_bias.png": np.asarray(image)}
    assert_same(pixels("out"), expected)
    again = ["--from_json", "out/sample.json", "--output_dir", "again"]
    assert sample.main(again) == 0
    assert_same(pixels("again"), expected)
    assert sample.main([*again, "--scheduler", "ddim"]) == 0
    assert not np.array_equal(pixels("again")["00_seed0_bias.png"], np.asarray(image))


def test_the_verdict_names_every_region() -> None:
    image = Image.new("RGB", (128, 128), "white")
    image.paste((220, 40, 40), (10, 10, 60, 60))
    layout = Layout(
        "a red square and a blue ring",
        regions=(Region("a red square", (0, 0, 0.5, 0.5)), Region("blue ring", (0.5, 0.5, 1, 1))),
    )
    lines = verdict(image, layout)
    assert re.fullmatch(r"red square: IoU 0\.[56]\d", lines[0]) and lines[1] == "blue ring: missing"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layout", "none.json"], "file none.json cannot be read"),
        (["--layout", "foreign.json"], "'cat' is not in the prompt"),
        (["--layout", "reversed.json"], "reversed or empty"),
        (["--layout", "photo.png"], "photo.png is an image with a colour for each region"),
        (["--prompt", "a cat"], "either --layout or --prompt"),
        (
            ["--control", "dence"],
            "Unknown control 'dence'; choose among bias, dense, .*spacetime_optimized and none",
        ),
        (["--control", "bias", "none"], "bias none cannot be combined"),
        (["--control", "bias+bias"], "cannot be combined"),
        (["--compare", "all", "all"], "given twice in --compare"),
        (["--compare", "all", "--control", "bias"], "either --compare or --control"),
        (["--set", "strenght=1"], "has a setting 'strenght'; choose among end, hide_phrases, mask_resize"),
        (["--set", "strength=much"], "strength must be a number, not 'much'"),
        (["--set", "strength=nan"], "finite number"),
        (["--set", "dense.w_self=1"], "No control of this run has a setting 'dense.w_self'"),
        (["--control", "guidance", "--set", "iterations=1.5"], "iterations must be a whole number"),
        (["--control", "guidance", "--set", "early_exit=maybe"], "early_exit must be true or false"),
        (["--control", "none", "--set", "strength=1"], "there is no control to set"),
        (["--control", "spacetime", "--set", "weight=much"], "weight must be a number, not 'much'"),
        (["--control", "spacetime", "--set", "weight=1.5"], "convex mix must lie in"),
        (["--control", "spacetime", "--set", "weights=1,0"], "float tensor"),
        (["--control", "spacetime_optimized", "guidance"], "cannot be combined; use spacetime with guidance"),
        (["--control", "spacetime_optimized", "--set", "epochs=0"], "at least 1 epoch"),
        (["--sweep", "strength"], "'strength' is not a setting"),
        (["--sweep", "strength=0,x"], "strength must be a number, not 'x'"),
        (["--sweep", "strength=0,0"], "value is given twice"),
        (["--sweep", "strength=0", "strength=1"], "one setting or two different ones"),
        (["--sweep", "strength=0,1", "--set", "strength=1"], "both in --set and in --sweep"),
        (["--sweep", "strength=" + ",".join(map(str, range(65)))], "65 images on a sheet"),
        (["--height", "128"], "layout is 64x64 pixels but the flags ask for 64x128"),
        (["--mask", "dogs.png"], "--mask is for an adapter"),
        (["--weight", "0.5"], "--weight is for an adapter"),
        (["--compare", "all", "--scheduler", "heun"], "HeunDiscreteScheduler would lose a control's shift"),
    ],
)
def test_bad_input_is_one_sentence_before_the_base_is_loaded(
    workspace: Path,
    flags: list[str],
    message: str,
    assert_refused_early: Callable[[list[str], str], None],
) -> None:
    assert_refused_early([*BASIC, *flags], message)


def test_flags_of_regions_need_a_layout(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--adapter", "any"]):
        assert sample.main(["--prompt", "a cat", *more, "--compare", "all"]) == 2
        assert "--compare needs a layout with regions; give --layout" in capsys.readouterr().err
    assert sample.main(["--prompt", "a cat", "--region_negatives", "false"]) == 2
    assert "--region_negatives needs a layout with regions; give --layout" in capsys.readouterr().err


def test_a_layout_without_a_size_takes_that_of_the_flags(workspace: Path) -> None:
    save_layout(Layout("a cat", regions=(Region("cat", (0, 0, 1, 0.5)),)), "free.json")
    flags = ["--layout", "free.json", "--base", "base", "--num_inference_steps", "1", "--height", "64"]
    assert sample.main([*flags, "--width", "96", "--output_dir", "out"]) == 0
    assert pixels("out")["00_seed0.png"].shape == (64, 96, 3)
