"""Photos, conditions and masks of any size in ``sample.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_helpers import CANNY, assert_same, pixels

from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.cli.sample import parse
from localctl.conditions import ConditionConfig, extract
from localctl.data.geometry import IMAGE, SMOOTH, geometry
from localctl.jobs.inputs import choose_size
from localctl.jobs.prepare import Job, prepare


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    return Image.fromarray(np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)[:height, :width])


def half(height: int, width: int) -> Image.Image:
    """White in the left half."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)


@pytest.fixture
def workspace(
    make_adapter: Callable[..., LocalAdapter], sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with an adapter for the tiny base of 64x64 pixels."""
    monkeypatch.chdir(tmp_path)
    make_adapter(base=str(sd_folder), condition=CANNY).save_pretrained("canny")
    return tmp_path


def planned(*flags: str) -> Job:
    return prepare(parse(["--prompt", "a b", "--adapter", "canny", *flags]))


@pytest.mark.parametrize(
    ("asked", "image", "multiple", "expected"),
    [
        ((None, None), None, 8, (512, 512)),  # the base's own
        ((None, None), (512, 768), 8, (512, 768)),  # suits the base: its own
        ((None, None), (1024, 1024), 8, (1024, 1024)),
        ((None, None), (256, 256), 8, (256, 256)),
        ((None, None), (3000, 4000), 8, (440, 592)),  # the base's area
        ((None, None), (4000, 3000), 8, (592, 440)),
        ((None, None), (84, 125), 8, (416, 624)),
        ((None, None), (720, 1280), 8, (720, 1280)),
        ((None, None), (720, 1280), 32, (384, 672)),  # the multiple of an adapter
        ((None, None), (8, 4000), 8, (24, 11448)),
        ((256, None), (300, 400), 8, (256, 344)),
        ((None, 256), (300, 400), 8, (192, 256)),
        ((256, None), None, 8, (256, 512)),
        ((64, 96), (3000, 4000), 8, (64, 96)),
    ],
)
def test_the_size_of_the_run(
    asked: tuple[int | None, int | None],
    image: tuple[int, int] | None,
    multiple: int,
    expected: tuple[int, int],
) -> None:
    assert choose_size(asked, image, (512, 512), multiple) == expected


def test_a_side_the_adapter_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="width 72 is not a multiple of 16, which the adapter needs; use 64"):
        choose_size((64, 72), None, (64, 64), 16)


@pytest.mark.parametrize("size", [(64, 64), (61, 90), (300, 200), (1000, 750), (17, 33)])
def test_a_photo_of_any_size_is_scaled_and_cropped_as_in_training(workspace: Path, size: tuple[int, int]) -> None:
    image = photo(*size)
    image.save("photo.png")
    half(*size).save("mask.png")
    job = planned("--image", "photo.png", "--mask", "mask.png")
    followed = job.adapters[0]
    seen = geometry(size, job.size)
    assert torch.equal(followed.condition, extract(ConditionConfig(**CANNY), np.array(seen.apply(image, IMAGE))))
    assert job.layouts[0].size == job.size and abs(job.size[0] / job.size[1] - size[0] / size[1]) < 0.3
    left, right = followed.mask[0, :, : job.size[1] // 2 - 2], followed.mask[0, :, job.size[1] // 2 + 2 :]
    assert left.min() == 1 and right.max() == 0
    assert bool(job.notes) == (size != (64, 64)) and all("photo.png is" in note for note in job.notes)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--resolution", "96"], (96, 96)),
        (["--resolution", "96x64"], (64, 96)),
        (["--resolution", "96X64"], (64, 96)),
        (["--height", "64", "--width", "96"], (64, 96)),
        (["--height", "96"], (96, 72)),
        (["--width", "96"], (96 * 4 // 3, 96)),
    ],
)
def test_the_spellings_of_a_size(workspace: Path, flags: list[str], expected: tuple[int, int]) -> None:
    photo(400, 300).save("photo.png")
    job = planned("--image", "photo.png", *flags)
    assert job.size == expected and job.adapters[0].condition.shape == (1, *expected)
    assert (job.options.height, job.options.width, job.options.resolution) == (*expected, None)


def test_a_given_condition_and_masks_of_other_sizes_are_scaled(workspace: Path) -> None:
    edges = Image.fromarray(np.array(photo(200, 300).convert("L")))
    edges.save("edges.png")
    half(100, 150).save("small.png")
    half(400, 600).save("large.png")
    flags = ["--condition_image", "edges.png", "--resolution", "64"]
    job = planned(*flags, "--mask", "small.png")
    expected = np.asarray(geometry((200, 300), (64, 64)).apply(edges, SMOOTH), np.float32)[None] / 255
    assert torch.equal(job.adapters[0].condition, torch.from_numpy(expected))
    for name in ("small.png", "large.png"):
        mask = planned(*flags, "--mask", name).adapters[0].mask
        assert mask[..., :31].min() == 1 and mask[..., 33:].max() == 0
    half(64, 64).save("result.png")
    job = planned(*flags, "--mask", "result.png")
    assert torch.equal(job.adapters[0].mask[0, 0], (torch.arange(64) < 32).float())
    assert "mask result.png has the size of the result" in " ".join(job.notes)


def test_an_image_of_the_right_size_is_not_changed(workspace: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (64, 72)).astype(np.uint8)
    mask = np.random.default_rng(1).integers(1, 256, (64, 72)).astype(np.uint8)
    Image.fromarray(gray).save("edges.png")
    Image.fromarray(mask).save("mask.png")
    for more in ([], ["--resolution", "72x64"], ["--height", "64"]):
        followed = planned("--condition_image", "edges.png", "--mask", "mask.png", *more)
        assert torch.equal(followed.adapters[0].condition[0], torch.from_numpy(gray).float() / 255)
        assert torch.equal(followed.adapters[0].mask[0], torch.from_numpy(mask / np.float64(255)).float())
        assert followed.notes == []


def test_the_size_of_the_layout(workspace: Path) -> None:
    photo(200, 300).save("photo.png")
    region = {"phrase": "a", "box": [0, 0, 0.5, 1]}
    Path("scene.json").write_text(json.dumps({"prompt": "a b", "height": 72, "width": 64, "regions": [region]}))
    job = prepare(parse(["--layout", "scene.json", "--adapter", "canny", "--image", "photo.png"]))
    assert job.size == (72, 64) and job.adapters[0].condition.shape == (1, 72, 64)


def test_several_photos_of_one_aspect_ratio(workspace: Path) -> None:
    photo(200, 300).save("one.png")
    photo(100, 150, 1).save("two.png")
    photo(100, 100, 1).save("square.png")
    two = ["--prompt", "a", "--adapter", "canny", "canny", "--image", "one.png"]
    job = prepare(parse([*two, "two.png"]))
    assert [item.condition.shape for item in job.adapters] == [(1, *job.size)] * 2
    with pytest.raises(ValueError, match="conditions are 300x200 and 100x100 pixels, two aspect ratios"):
        prepare(parse([*two, "square.png"]))
    assert prepare(parse([*two, "square.png", "--resolution", "64"])).size == (64, 64)


def test_a_cropped_run_is_repeated_from_its_record(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(100, 177).save("photo.png")
    half(50, 88).save("mask.png")
    flags = ["--prompt", "a b", "--adapter", "canny", "--image", "photo.png", "--mask", "mask.png"]
    assert sample.main([*flags, "--num_inference_steps", "1", "--output_dir", "out"]) == 0
    printed = capsys.readouterr()
    assert (
        "photo.png is 177x100 pixels, scaled and cropped to 88x48" in printed.err and "loading the base" in printed.err
    )
    assert printed.out == "out/00_seed0.png\n"
    Path("photo.png").unlink()
    assert sample.main(["--from_json", "out", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("out"))
    assert pixels("out")["00_seed0.png"].shape == (48, 88, 3)
    assert sample.main(["--from_json", "out", "--resolution", "64", "--output_dir", "other"]) == 0
    assert pixels("other")["00_seed0.png"].shape == (64, 64, 3)


def test_a_gray_condition_for_a_published_adapter_of_three_channels(
    workspace: Path, make_adapter: Callable[..., LocalAdapter], sd_folder: Path
) -> None:
    """Which name no condition; one that names another is refused."""
    make_adapter(in_channels=3).save_t2iadapter("plain")
    make_adapter(in_channels=3, condition={"kind": "palette"}).save_pretrained("palette")
    photo(64, 64).save("photo.png")
    flags = ["--prompt", "a", "--image", "photo.png", "--condition", "canny", "--base", str(sd_folder)]
    condition = prepare(parse([*flags, "--adapter", "plain"])).adapters[0].condition
    assert condition.shape == (3, 64, 64) and torch.equal(condition[0], condition[2])
    with pytest.raises(ValueError, match="canny condition has 1 channels but the adapter palette takes 3"):
        prepare(parse([*flags, "--adapter", "palette"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "60"], "height 60 is not a positive multiple of 8; use 64"),
        (["--resolution", "0"], "height 0 is not a positive multiple"),
        (["--resolution", "64,64"], "'64,64' is not a size; write 512 or WIDTHxHEIGHT"),
        (["--resolution", "-64"], "expected one argument|is not a size"),
        (["--resolution", "64", "--width", "64"], "either --resolution or --height and --width"),
        (["--height", "80000"], "height 80000 is over 8192"),
        (
            ["--mask", "square.png"],
            "mask square.png is 50x50 pixels but the image photo.png is 200x100, another aspect",
        ),
        (["--mask", "edge.png", "--resolution", "64"], "mask edge.png is black everywhere in the part of photo.png"),
        (["--image", "."], "no image file ., but something else, such as a folder; give an image"),
    ],
)
def test_impossible_sizes_are_refused(
    workspace: Path,
    flags: list[str],
    message: str,
    assert_refused_early: Callable[[list[str], str], None],
) -> None:
    photo(100, 200).save("photo.png")
    half(50, 50).save("square.png")
    edge = np.zeros((100, 200), np.uint8)
    edge[:, :20] = 255
    Image.fromarray(edge).save("edge.png")
    basic = ["--prompt", "a b", "--adapter", "canny", "--image", "photo.png"]
    assert_refused_early([*basic, *flags], message)
