"""Images carry the record that repeats them, and a job knows its command."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sample_helpers import CANNY, PLAIN, QUICK, assert_same, pixels

from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.cli.sample import parse
from localctl.jobs.embedded import KEY, embedded, read_embedded, settings_in
from localctl.jobs.prepare import prepare
from localctl.jobs.settings import SampleSettings, command_line


@pytest.fixture
def inputs(base_here: Path, make_adapter: Callable[..., LocalAdapter], sd_folder: Path) -> Path:
    """A layout with a mask, a photo with a mask, and an adapter."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save("photo.png")
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    Image.fromarray(left).save("left.png")
    regions = [{"phrase": "a", "mask": "left.png"}, {"phrase": "b", "box": [0.5, 0, 1, 1]}]
    Path("scene.json").write_text(json.dumps({"prompt": "a b", "regions": regions}))
    make_adapter(base=str(sd_folder), condition=CANNY).save_pretrained("canny")
    return base_here


FULL = ["--layout", "scene.json", "--image", "photo.png", "--mask", "left.png", "--adapter", "canny", "--base", "base"]


def with_record(record: Any, path: str) -> None:
    texts = PngInfo()
    texts.add_itxt(KEY, record if isinstance(record, str) else json.dumps(record), zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=texts)


def test_an_image_alone_repeats_its_run(inputs: Path) -> None:
    flags = [*FULL, *QUICK, "--seeds", "1", "-2", "--compare", "none", "bias", "--output_dir", "out"]
    assert sample.main(flags) == 0
    expected = pixels("out")
    names = {str(read_embedded(path)["image"]) for path in Path("out").glob("*_seed*.png")}
    assert names == set(expected) and "files" in read_embedded(Path("out/compare.png"))
    record = read_embedded(Path("out/00_seed1_bias.png"))
    assert settings_in(record, Path("new"))["region_negatives"] is True
    del record["options"]["region_negatives"]  # as earlier versions wrote it
    assert settings_in(record, Path("old"))["region_negatives"] is False
    Path("out/00_seed1_bias.png").rename("shared.png")
    for name in ("scene.json", "photo.png", "left.png"):
        Path(name).unlink()
    assert sample.main(["--from_json", "shared.png", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), expected)
    assert sample.main(["--from_json", "shared.png", "--seeds", "1", "--control", "bias", "--output_dir", "one"]) == 0
    assert list(pixels("one")) == ["00_seed1.png"]


def test_the_command_of_a_job_repeats_it(inputs: Path) -> None:
    job = prepare(parse([*FULL, *QUICK, "--negative_prompt=-ugly", "--seeds", "-3", "--no_record"]))
    command = command_line(replace(job.options, output_dir="out"))
    assert sample.main(shlex.split(command)[1:]) == 0
    expected = pixels("out")
    assert "localctl" not in Image.open("out/00_seed-3.png").info
    assert sample.main([*FULL, *QUICK, "--negative_prompt=-ugly", "--seeds", "-3", "--output_dir", "typed"]) == 0
    assert_same(pixels("typed"), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": ["-x", "a 'b' $c", "", "cat"], "resolution": (64, 72), "guidance_scale": 1.5, "seeds": [-1, 2]},
        {"prompt": ["a"], "use_karras_sigmas": False, "embed_record": False, "negative_prompt": "--seeds"},
        {"level_weights": ["-0.5,1,1,1"], "prompt": ["a"], "controlnet_scale": [-1e-05]},
        {"layout": ["-scene.json"], "set": ["strength=0.5"], "compare": ["none", "bias+dense"], "base": "micro"},
    ],
)
def test_the_command_is_read_as_the_same_settings(settings: dict[str, Any]) -> None:
    options = SampleSettings(**settings)
    read = parse(shlex.split(command_line(options))[1:])
    dashed = [name if not name.startswith("-") else f"./{name}" for name in options.layout or ()] or None
    assert read == replace(options, layout=dashed)


def test_a_record_in_an_image_names_no_folder_of_its_maker(
    inputs: Path, make_adapter: Callable[..., LocalAdapter], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = str(Path("base").absolute()), str(Path("canny").absolute())
    flags = [item if item not in ("base", "canny") else str(Path(item).absolute()) for item in FULL]
    assert sample.main([*flags, *QUICK, "--output_dir", str(inputs / "out")]) == 0
    text = Image.open("out/00_seed0.png").info[KEY]
    assert str(inputs) not in text and "output_dir" not in text
    Path("elsewhere").mkdir()
    assert sample.main(["--from_json", "out/00_seed0.png", "--output_dir", "again"]) == 0, "found in this folder"
    Path("base").rename("moved")
    capsys.readouterr()
    assert sample.main(["--from_json", "out/00_seed0.png", "--output_dir", "again"]) == 2
    assert "was made with --base 'base', which is not here; give --base" in capsys.readouterr().err
    again = ["--from_json", "out/00_seed0.png", "--base", "moved", "--adapter", adapter, "--output_dir", "again"]
    assert sample.main(again) == 0 and base
    assert_same(pixels("again"), pixels("out"))
    record = embedded({"set": ["clip=/home/me/clip", "strength=1"], "base": "owner/name", "vae": "..\\x\\vae"}, inputs)
    assert record["options"] == {"set": ["clip=clip", "strength=1"], "base": "owner/name", "vae": "vae"}
    assert record["needs"] == {"vae": "vae"}
    places = {"lora": ["a=/home/me/rate=1/b.safetensors", "c=d.safetensors"], "condition_model": ["/home/me/depth"]}
    assert embedded(places, inputs)["options"] == {
        "lora": ["a=b.safetensors", "c=d.safetensors"],
        "condition_model": ["depth"],
    }


def test_a_record_in_an_image_does_not_say_where_to_read_models_or_write(base_here: Path) -> None:
    here = {"output_dir": "/home/me", "device": "cuda", "embed_record": False, "local_files_only": False}
    record = {"options": {"prompt": ["a"], **here}}
    assert settings_in(record, Path("unpacked")) == {"prompt": ["a"]}
    many = {"options": {"layout": ["inputs/layout_1000.json"]}, "files": {"layout_1000.json": ""}}
    assert settings_in(many, Path("unpacked"))["layout"] == ["unpacked/inputs/layout_1000.json"]
    for place in ("/home/me/base", "~/base", "../base"):
        elsewhere = {"options": {"prompt": ["a"], "adapter": [place]}}
        with pytest.raises(ValueError, match="names a folder of this machine, .*; give --adapter"):
            settings_in(elsewhere, Path("unpacked"))
        assert settings_in(elsewhere, Path("unpacked"), ["adapter"])["adapter"] == [place]


def test_a_record_too_long_for_an_image_is_in_the_folder_alone(
    base_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("localctl.jobs.run.MOST_TEXT", 100)
    assert sample.main([*PLAIN, "--output_dir", "out"]) == 0
    assert "too long to be written into its images; sample.json repeats it" in capsys.readouterr().err
    assert KEY not in Image.open("out/00_seed0.png").info
    assert sample.main(["--from_json", "out", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("out"))


def test_large_inputs_are_asked_for(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("localctl.jobs.embedded.MOST_BYTES", Path("photo.png").stat().st_size - 1)
    assert sample.main([*FULL, *QUICK, "--output_dir", "out"]) == 0
    Path("photo.png").rename("mine.png")
    assert sample.main(["--from_json", "out/00_seed0.png", "--output_dir", "again"]) == 2
    assert "The image does not hold its image, 'image_0.png (SHA-256 " in capsys.readouterr().err
    assert sample.main(["--from_json", "out/00_seed0.png", "--image", "mine.png", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("out"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "record in the image .* is damaged"),
        ([], "damaged"),
        ({"options": 3}, "damaged"),
        (
            {"options": {"prompt": ["a"], "colour": 1}},
            "record in the image cannot .* no setting 'colour'",
        ),
        ({"options": {"prompt": 1}}, "record in the image cannot be used: prompt must be text, not 1"),
        ({"options": {"layout": ["/etc/passwd"]}}, "does not hold its input '/etc/passwd'"),
        ({"options": {"mask": ["inputs/../../x"]}}, "does not hold its input"),
        ({"options": {"image": [7]}}, "does not hold its input 7"),
        ({"options": {}, "files": {"../x_0.png": ""}}, "holds a file '../x_0.png', which no run has"),
        ({"options": {}, "files": {"mask_0.png": "%"}}, "file mask_0.png in the record of the image is damaged"),
        ({"options": {}, "files": {"mask_0.png": "é"}}, "file mask_0.png in the record of the image is damaged"),
        ({"options": {"image": ["x"]}, "needs": 5}, "does not hold its input 'x'"),
        ({"options": {"prompt": ["a"]}, "needs": {"base": "gone"}}, "made with --base 'gone', which is not here"),
    ],
)
def test_a_record_that_no_run_wrote_is_refused(record: Any, message: str, base_here: Path) -> None:
    with_record(record, "bad.png")
    with pytest.raises(ValueError, match=message) as error:
        settings_in(read_embedded(Path("bad.png")), Path("unpacked"))
    assert "\n" not in str(error.value)
    assert not Path("x_0.png").exists()


def test_images_without_a_record_are_refused(base_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("cut.png").write_bytes(Path("plain.png").read_bytes()[:20])
    for name, words in (("plain.png", "has no record of localctl"), ("cut.png", "cannot be read")):
        assert sample.main([*PLAIN, "--from_json", name]) == 2
        assert words in capsys.readouterr().err
    with_record({"options": {"prompt": ["a"], "mask": ["inputs/mask_0.png"]}, "files": {"mask_0.png": "AAAA"}}, "a.png")
    options = settings_in(read_embedded(Path("a.png").read_bytes()), base_here / "new")
    assert Path(options["mask"][0]).read_bytes() == base64.b64decode("AAAA")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    with pytest.raises(ValueError, match="The image cannot be read"):
        read_embedded(buffer.getvalue())
