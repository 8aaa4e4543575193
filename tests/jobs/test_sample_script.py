from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sample_helpers import CANNY, QUICK, assert_same, pixels

import localctl.pipelines
from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.cli.sample import parse
from localctl.conditions import ConditionConfig, extract
from localctl.control.image_controls import LocalAdapterControl
from localctl.jobs.prepare import prepare
from localctl.masks import load_mask
from localctl.sampling import generate

pytest_plugins = ["condition_models_here"]

MakeAdapter = Callable[..., LocalAdapter]


@pytest.fixture
def workspace(make_adapter: MakeAdapter, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two adapters for the tiny base, a photo, conditions and masks, some of them unusable."""
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = {"base": str(sd_folder), "condition": CANNY}
    make_adapter(**config).save_pretrained("canny")
    make_adapter(1, in_channels=3, base=str(sd_folder), condition={"kind": "palette"}).save_pretrained("run/adapter")
    make_adapter(2, base="sd15", condition=CANNY).save_pretrained("foreign")
    make_adapter(2).save_pretrained("mute")
    make_adapter(3).save_t2iadapter("plain")
    Path("base").symlink_to(sd_folder)
    rng = np.random.default_rng(0)
    photo = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(photo[:56]).save("low.png")
    Image.fromarray(photo[:, :60]).save("odd.png")
    mask = np.zeros((64, 64), np.uint8)
    Image.fromarray(mask).save("black.png")
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask[:, :32]).save("narrow.png")
    Path("text.png").write_text("not an image")
    return tmp_path


BASIC = ["--prompt", "a b", "--image", "photo.png", "--mask", "mask.png", "--adapter", "canny"]


def test_the_images_are_the_same_as_from_generate(workspace: Path, sd_folder: Path) -> None:
    options = ["--seeds", "4", "2", "--guidance-scale", "3", "--negative-prompt", "x", "--output-dir", "out"]
    assert sample.main([*BASIC, *QUICK, *options]) == 0
    pipe = localctl.pipelines.load_pipeline(str(sd_folder))
    condition = extract(ConditionConfig(**CANNY), np.asarray(Image.open("photo.png")))
    assert 0 < condition.mean() < 1
    control = LocalAdapterControl(LocalAdapter.from_pretrained("canny"), condition, load_mask("mask.png"))
    arguments: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "x"}
    output = generate(pipe, "a b", control, (4, 2), **arguments)
    expected = {f"00_seed{seed}.png": np.asarray(image) for seed, image in zip((4, 2), output.images, strict=True)}
    assert_same(pixels("out"), expected)
    plain = generate(pipe, "a b", (), 4, **arguments).images[0]
    assert not np.array_equal(np.asarray(plain), expected["00_seed4.png"])


def test_the_record_repeats_the_run_from_anywhere(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--prompt", "a cat", "dogs", "--image", "photo.png", "--mask", "mask.png", "--adapter", "canny", "run"]
    windows = ["--weight", "1", "0.5", "--start", "0", "0.5", "--end", "0.5", "1", "--seeds", "1", "-2"]
    more = ["--scheduler", "euler_ancestral", "--negative_prompt=-x", "--guidance_scale", "2.5", "--batch_size", "3"]
    assert sample.main([*flags, *windows, *more, *QUICK, "--output_dir", "out"]) == 0
    assert len(pixels("out")) == 4 and Image.open("out/sheet.png").size[0] > 4 * 64
    shutil.move("out", "moved")
    for name in ("photo.png", "mask.png"):
        Path(name).unlink()  # the record must not need them
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    assert sample.main(["--from_json", "../moved/sample.json", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("../moved"))
    assert sample.main(["--from_json", "again/sample.json", "--output_dir", "again", "--seeds", "1"]) == 0  # in place
    assert_same(pixels("again/earlier_1"), pixels("../moved"))
    assert json.loads(Path("again/sample.json").read_text())["images"] == ["00_seed1.png", "01_seed1.png"]
    assert_same(pixels("again"), {name: pixels("../moved")[name] for name in ("00_seed1.png", "01_seed1.png")})
    for change in (["--weight", "0.2"], ["--end", "1"], ["--scheduler", "ddim"], ["--negative_prompt", "y"]):
        assert sample.main(["--from_json", "../moved/sample.json", *change, "--output_dir", "other"]) == 0
        assert not np.array_equal(pixels("other")["00_seed1.png"], pixels("../moved")["00_seed1.png"]), change


def test_a_given_condition_equals_the_computed_one(workspace: Path) -> None:
    condition = extract(ConditionConfig(**CANNY), np.asarray(Image.open("photo.png")))
    Image.fromarray((condition[0].numpy() * 255).astype(np.uint8)).save("edges.png")
    assert sample.main([*BASIC, *QUICK, "--output_dir", "one"]) == 0
    flags = ["--condition-image", "edges.png", "--prompt", "a b", "--mask", "mask.png", "--adapter", "canny"]
    assert sample.main([*flags, *QUICK, "--output_dir", "two"]) == 0
    assert_same(pixels("one"), pixels("two"))


def test_a_plain_t2iadapter_works_and_no_mask_means_everywhere(workspace: Path, sd_folder: Path) -> None:
    flags = ["--prompt", "a b", "--image", "photo.png", "--adapter", "plain", "--condition", "sobel"]
    base = ["--base", str(sd_folder)]
    assert sample.main([*flags, *base, *QUICK, "--output_dir", "one"]) == 0
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save("white.png")
    assert sample.main([*flags, "--base", "base", *QUICK, "--mask", "white.png", "--output_dir", "two"]) == 0
    assert_same(pixels("one"), pixels("two"))
    assert json.loads(Path("two/sample.json").read_text())["options"]["base"] == str(sd_folder.resolve())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--mask", "narrow.png"],
            "mask narrow.png is 32x64 pixels but the image photo.png is 64x64, another aspect ratio",
        ),
        (["--mask", "black.png"], "mask black.png is black everywhere"),
        (["--mask", "none.png"], "no image file none.png"),
        (["--image", "text.png"], "text.png is not a PNG"),
        (["--height", "60"], "height 60 is not a positive multiple of 8"),
        (["--condition", "cany"], "Unknown condition.kind 'cany'"),
        (["--condition", "palette"], "palette condition has 3 channels but the adapter .*canny takes 1"),
        (["--condition", "depth", "--condition_model", "."], "model . of condition=depth cannot be loaded"),
        (["--adapter", "nowhere"], "no adapter 'nowhere' .no such folder or file"),
        (["--adapter", "."], "no adapter '.' .no config.json in it"),
        (
            ["--adapter", "foreign", "canny"],
            "adapter foreign, which was trained on the base sd15, does not fit sd15",
        ),
        (["--base", "sd15"], "adapter canny, which was trained on the base .*, does not fit sd15"),
        (["--base", "sd16", "--adapter", "mute", "--condition", "canny"], "no base 'sd16'"),
        (["--adapter", "mute", "--condition", "canny"], "does not say which base"),
        (["--adapter", "mute", "--base", "sd15"], "does not say which condition"),
        (["--condition_image", "photo.png"], "either --image or --condition_image"),
        (["--mask", "mask.png", "mask.png"], "--mask has 2 values for 1 adapters"),
        (["--seeds", "1", "1"], "seed is given twice"),
        (["--seeds", "x"], "invalid int value: 'x'"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be at least 1"),
        (["--weight", "nan"], "must be finite"),
        (["--start", "0.8", "--end", "0.2"], "0 <= start < end <= 1"),
        (["--scheduler", "dimm"], "invalid choice: 'dimm'"),
        (["--device", "moon"], "device 'moon' cannot be used"),
        (["--dtype", "half"], "invalid choice: 'half'"),
        (["--sead", "1"], "[Uu]nrecognized arguments: --sead"),
        (["--output_dir", "photo.png/out"], "output folder photo.png/out cannot be created"),
        (["--from_json", "none.json"], "record none.json cannot be read"),
        (["--from_json", "text.png"], "text.png is not a record"),
    ],
)
def test_bad_input_is_one_sentence_before_the_base_is_loaded(
    workspace: Path,
    changes: list[str],
    message: str,
    assert_refused_early: Callable[[list[str], str], None],
) -> None:
    assert_refused_early([*BASIC, *changes], message)


def test_conditions_of_two_sizes_and_colours_are_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--prompt", "a", "--adapter", "canny", "canny"]
    assert sample.main([*two, "--image", "photo.png", "low.png"]) == 2
    assert "conditions are 64x64 and 64x56 pixels" in capsys.readouterr().err
    assert sample.main(["--prompt", "a", "--adapter", "canny", "--condition_image", "photo.png"]) == 2
    assert "photo.png is in colour but the adapter takes 1 channel" in capsys.readouterr().err
    ready = ["--prompt", "a", "--adapter", "canny", "--condition_image", "photo.png"]
    assert sample.main([*ready, "--condition", "sobel"]) == 2
    assert "--condition sobel says what to compute from --image; the adapter canny takes" in capsys.readouterr().err


def test_missing_flags_are_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for left_out in ("--prompt", "--adapter", "--image"):
        at = BASIC.index(left_out)
        assert sample.main(BASIC[:at] + BASIC[at + 2 :]) == 2
        assert f"give {left_out}" in capsys.readouterr().err


def test_a_damaged_adapter_and_a_missing_base_are_one_sentence(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path("canny/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert sample.main(BASIC) == 2
    printed = capsys.readouterr().err
    assert "weights of the adapter there cannot be read" in printed and printed.count("\n") == 1
    config = json.loads(Path("canny/config.json").read_text())
    Path("canny/config.json").write_text(json.dumps({**config, "base": str(workspace / "gone")}))
    assert sample.main(BASIC) == 2
    assert "There is no base" in (printed := capsys.readouterr().err) and printed.count("\n") == 1
    Path("canny/config.json").write_text("{")
    assert sample.main(BASIC) == 2
    assert "config.json is not valid JSON" in capsys.readouterr().err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        sample.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--prompt", "--condition_image", "--mask", "--from_json", "--scheduler"))


def test_the_device_default_exists(workspace: Path) -> None:
    job = prepare(parse(BASIC))
    assert torch.empty(0, device=job.device).device.type == job.device.type
    assert job.layouts[0].size == (64, 64) and job.adapters[0].saved.place == str((workspace / "canny").resolve())


def test_marks_in_prompts_are_checked_before_the_base_is_loaded(
    workspace: Path, assert_refused_early: Callable[[list[str], str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = BASIC.index("--prompt")

    def flags(prompt: str) -> list[str]:
        return [*BASIC[:at], "--prompt", prompt, *BASIC[at + 2 :]]

    lora = flags("(a red circle:1.5), <lora:fluffy:0.8>")
    assert_refused_early(lora, "has '<lora:fluffy:0.8>', syntax of other tools; load a LoRA by --lora, or read it as")
    assert_refused_early([*BASIC, "--negative_prompt", "(x:11)"], "has a weight of 11; give weights from 0 to 10")
    monkeypatch.setattr("localctl.prompt_weights.has_compel", lambda: False)
    assert_refused_early(flags("(a red circle:1.5)"), "has weights, which compel encodes; pip install")
    with pytest.warns(UserWarning, match="syntax of other tools .such as .word:1.3., <lora:name:0.8>."):
        job = prepare(parse([*lora, "--prompt_weighting", "false"]))
    assert job.options.prompt_weighting is False


def test_weights_in_prompts_change_the_image_and_are_repeated_from_the_record(workspace: Path) -> None:
    pytest.importorskip("compel")
    at = BASIC.index("--prompt")
    run = [*BASIC[:at], *BASIC[at + 2 :], *QUICK, "--output_dir"]
    assert sample.main([*run, "weighted", "--prompt", "a ((red:1.5)) circle"]) == 0
    assert sample.main([*run, "plain", "--prompt", "a red circle"]) == 0
    assert sample.main(["--from_json", "weighted/sample.json", "--output_dir", "again"]) == 0
    (weighted,), (plain,), (again,) = (list(pixels(name).values()) for name in ("weighted", "plain", "again"))
    assert np.array_equal(weighted, again) and not np.array_equal(weighted, plain)


def test_models_of_conditions_that_would_do_nothing_are_refused(
    workspace: Path, assert_refused_early: Callable[[list[str], str], None]
) -> None:
    assert_refused_early([*BASIC, "--condition_model", "x"], "canny condition is computed without a model; leave")
    of_file = ["--condition_image" if flag == "--image" else flag for flag in BASIC]
    assert_refused_early(
        [*of_file, "--condition_model", "x"], "--condition_model is for conditions that are computed from --image"
    )


def test_conditions_come_from_models_and_are_repeated_from_the_record(
    workspace: Path, condition_model: Callable[[str], Path]
) -> None:
    depth = ["--condition", "depth", "--condition_model", str(condition_model("depth"))]
    assert sample.main([*BASIC, *QUICK, *depth, "--output_dir", "depth"]) == 0
    assert sample.main([*BASIC, *QUICK, "--output_dir", "canny"]) == 0
    assert sample.main(["--from_json", "depth/sample.json", "--output_dir", "again"]) == 0
    found = {name: next(iter(pixels(name).values())) for name in ("depth", "canny", "again")}
    assert np.array_equal(found["depth"], found["again"]) and not np.array_equal(found["depth"], found["canny"])
    Image.open("photo.png").convert("L").save("gray.png")
    given = ["--from_json", "depth/sample.json", "--condition_image", "gray.png", "--output_dir", "given"]
    assert sample.main(given) == 0, "the model of the record computes nothing here"


def test_an_image_of_nan_ends_with_code_2_and_is_not_written(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that overflows, as a strength of 1e308 would."""
    assert sample.main([*BASIC, *QUICK, "--weight", "1e37", "--output_dir", "out"]) == 2
    printed = capsys.readouterr().err
    assert "image with seed" in printed and "holds NaN" in printed
    assert not list(Path("out").glob("*.png"))
