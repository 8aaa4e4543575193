"""The output folder of ``sample.py``: one run at a time, nothing outside it, and what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_helpers import PLAIN, QUICK, assert_same, pixels

import localctl.jobs.files
import localctl.jobs.generate
import localctl.jobs.run
from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.jobs.files import file_endings, open_output
from localctl.jobs.variants import Variant
from localctl.layout import Layout, Region
from localctl.layout_io import load_layout, save_layout
from localctl.lock import LOCK, FolderLock, start_time


@pytest.fixture
def plain(base_here: Path) -> list[str]:
    return ["--prompt", "a b", "--base", "base", "--num_inference_steps", "1", "--output_dir", "out"]


def test_a_folder_in_use_is_refused_before_the_base_is_loaded(
    plain: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lock = FolderLock(Path("out"))
    owner = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**owner, "pid": os.getppid(), "began": start_time(os.getppid())}))
    assert sample.main(plain) == 2
    printed = capsys.readouterr().err
    assert "in use by process" in printed and "loading the base" not in printed
    lock.path.unlink()
    assert sample.main(plain) == 0 and len(pixels("out")) == 1
    assert not (Path("out") / LOCK).exists()


def test_a_second_run_keeps_the_first_one_apart(plain: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Images with their record and its inputs, whatever the second run writes; what else is there stays."""
    layout = Layout("a b", regions=(Region("a", box=(0, 0, 0.5, 1)),))
    save_layout(layout, "scene.json")
    rest = ["--base", "base", "--num_inference_steps", "1", "--output_dir", "out"]
    assert sample.main(["--layout", "scene.json", *rest, "--seeds", "0", "1", "--save_steps", "1"]) == 0
    Path("out/inputs/mine.png").write_text("mine")
    first, names = pixels("out"), {path.relative_to("out") for path in Path("out").rglob("*.*")}
    assert "earlier" not in capsys.readouterr().err
    assert sample.main(plain) == 0
    assert "out held an earlier run, which is now in out/earlier_1." in capsys.readouterr().err
    assert list(pixels("out")) == ["00_seed0.png"] == json.loads(Path("out/sample.json").read_text())["images"]
    assert_same(pixels("out/earlier_1"), first)
    mine = Path("inputs/mine.png")
    assert {path.relative_to("out/earlier_1") for path in Path("out/earlier_1").rglob("*.*")} == names - {mine}
    assert Path("out", mine).read_text() == "mine" and not list(Path("out/inputs").glob("layout*"))
    assert sample.main(["--from_json", "out/earlier_1", "--output_dir", "out/earlier_1"]) == 0  # reads its own inputs
    assert_same(pixels("out/earlier_1"), first)
    assert_same(pixels("out/earlier_1/earlier_1"), first)
    assert sample.main(plain) == 0 and list(pixels("out/earlier_2")) == ["00_seed0.png"]


def test_images_of_a_run_that_did_not_end_are_kept(plain: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(localctl.jobs.run, "save_record", full)
        assert sample.main(plain) == 1
    before = pixels("out")
    assert sample.main([*plain, "--prompt", "c d"]) == 0
    assert_same(pixels("out/earlier_1"), before)
    before = pixels("out")
    with monkeypatch.context() as patch:
        patch.setattr(localctl.jobs.run, "load_models", full)
        assert sample.main(plain) == 1
    assert_same(pixels("out"), before)
    with monkeypatch.context() as patch:
        patch.setattr(localctl.jobs.run, "generate_job", full)
        assert [sample.main(plain), sample.main(plain)] == [1, 1]  # without an image, there is nothing to keep
    assert sorted(path.name for path in Path("out").glob("earlier*")) == ["earlier_1", "earlier_2"]


def test_inputs_are_those_of_before_the_base_is_loaded(base_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_layout(Layout("a b"), "scene.json")
    rest = ["--base", "base", "--num_inference_steps", "1", "--output_dir", "out"]
    load = localctl.jobs.run.load_models

    def removing(job: Any) -> Any:
        Path("scene.json").unlink()
        return load(job)

    monkeypatch.setattr(localctl.jobs.run, "load_models", removing)
    assert sample.main(["--layout", "scene.json", *rest]) == 0
    assert load_layout("out/inputs/layout_0.json").prompt == "a b"


def test_files_of_the_user_alone_are_no_earlier_run(plain: list[str]) -> None:
    Path("out").mkdir()
    for name in ("2024_seedlings.png", "1_seed.png", "sheet.png"):
        Path("out", name).write_text("mine")
    assert sample.main(plain) == 0 and not list(Path("out").glob("earlier*"))
    assert Path("out/2024_seedlings.png").read_text() == "mine"


def test_links_are_replaced_or_refused(plain: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    for name in ("00_seed0.png", "sheet.png", "sample.json"):
        Path(f"mine_{name}").write_text("mine")
        Path("out", name).symlink_to(Path(f"mine_{name}").absolute())
    assert sample.main(plain) == 0 and len(pixels("out")) == 1
    assert {path.read_text() for path in Path().glob("mine_*")} == {"mine"}
    assert not any(path.is_symlink() for path in Path("out").iterdir())
    Path("out/inputs").rmdir()
    Path("mine").mkdir()
    Path("out/inputs").symlink_to(Path("mine").absolute())
    assert sample.main(plain) == 2 and "inputs is a link" in capsys.readouterr().err


def test_file_names_are_short_and_unique() -> None:
    labels = ["a/b", "a_b", "strength=" + "1" * 300, "strength=" + "1" * 299, "bias"]
    names = file_endings([Variant(label, ()) for label in labels])
    assert len(set(names)) == 5 and max(map(len, names)) < 100 and names[-1] == "bias"


def test_the_output_folder_is_checked_before_the_base_is_loaded(
    base_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(localctl.jobs.generate, "load_pipeline", never)
    with pytest.raises(OSError, match="has .* MB free but the images may take"):
        open_output("out", 10**18)
    assert not list(Path("out").iterdir())

    for number, rc, words in ((28, 1, "disk of the output folder out is full"), (13, 2, "cannot be written to")):

        def refuse(*args: Any, number: int = number, **options: Any) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(localctl.jobs.files.tempfile, "TemporaryFile", refuse)
        assert sample.main([*PLAIN, "--output_dir", "out"]) == rc
        assert words in (printed := capsys.readouterr().err) and printed.count("\n") == 1


def test_a_disk_that_fills_up_keeps_what_was_written(
    base_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Image.Image.save

    def save(self: Image.Image, path: Any, *args: Any, **options: Any) -> None:
        if "seed2" in str(path):
            raise OSError(28, "No space left on device")
        original(self, path, *args, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    assert sample.main([*PLAIN, "--seeds", "1", "2", "--output_dir", "out"]) == 1
    assert "00_seed2.png could not be written (No space left on device)" in capsys.readouterr().err
    assert list(pixels("out")) == ["00_seed1.png"]


def test_an_input_in_the_output_folder_is_kept(
    make_adapter: Callable[..., LocalAdapter], base_here: Path, sd_folder: Path
) -> None:
    """Although the first image has the same name."""
    make_adapter(base=str(sd_folder), condition={"kind": "canny"}).save_pretrained("canny")
    Path("out").mkdir()
    edges = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(edges).save("out/00_seed0.png")
    flags = ["--prompt", "a b", "--adapter", "canny", *QUICK]
    assert sample.main([*flags, "--condition_image", "out/00_seed0.png", "--output_dir", "out"]) == 0
    assert np.array_equal(np.asarray(Image.open("out/inputs/condition_image_0.png")), edges)
    assert sample.main(["--from_json", "out", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("out"))
