"""evaluate_quantitative_metrics.py on folders of images without records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from localctl.cli import evaluate_metrics as evaluate_quantitative_metrics
from localctl.evaluation import plain
from localctl.evaluation.plain import LEFT_OUT, image_files
from localctl.evaluation.workers import spread
from localctl.micro.scenes import scene

pytest_plugins = ["evaluation_fixtures"]

COUNT = 6


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Write photos, similar photos, and noisy copies of the photos, one of another size and one damaged."""
    made = {name: tmp_path / name for name in ("photos", "near", "noisy")}
    for name, folder in made.items():
        (folder / "deeper").mkdir(parents=True)
        for i in range(COUNT):
            image = scene(i + (COUNT if name == "near" else 0), "basic", "test").image
            if name == "noisy":
                image = np.random.default_rng(i).integers(0, 256, image.shape, dtype=np.uint8)
            Image.fromarray(image).save(folder / ("deeper" if i % 2 else ".") / f"{i}.PNG")
    (made["photos"] / ".trash").mkdir()
    (made["photos"] / ".trash" / "old.png").write_bytes(b"")
    (made["photos"] / "notes.txt").write_text("no image")
    Image.new("RGB", (200, 100)).save(made["noisy"] / "wide.jpg")
    (made["noisy"] / "broken.png").write_bytes(b"\x89PNG")
    return made


def run(folders: dict[str, Path], out: Path, *flags: str) -> int:
    sets = [f"{name}={folder}" for name, folder in folders.items()]
    return evaluate_quantitative_metrics.main([*sets, f"output-dir={out}", *flags])


def test_folders_are_compared_and_metrics_that_need_records_are_named(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders, tmp_path / "out") == 0
    shown = capsys.readouterr()
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = content["rows"]
    assert {name: row["images"] for name, row in rows.items()} == {"photos": COUNT, "near": COUNT, "noisy": COUNT + 1}
    assert rows["noisy"]["sizes"] == {"128x128": COUNT, "200x100": 1} and "distances" not in rows["photos"]
    near, noisy = (rows[name]["distances"]["frechet_micro_clip"] for name in ("near", "noisy"))
    assert (
        0 < near < noisy and rows["near"]["distances"]["kid_micro_clip"] < rows["noisy"]["distances"]["kid_micro_clip"]
    )
    assert LEFT_OUT in shown.out and (tmp_path / "out" / "metrics.md").read_text() in shown.out
    assert "warning: 1 files of noisy cannot be read (broken.png" in shown.err and "several sizes" in shown.err
    assert content["reference"] == "photos" and content["provenance"]["weights_sha256"]


def test_a_folder_alone_is_named_like_itself_and_another_may_be_the_reference(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = {"metrics.json", "metrics.tex", "metrics.png", "sheet_a.png"}  # of sets, which have more files
    (tmp_path / "out").mkdir()
    for name in (*earlier, "mine.png", "metrics.csv"):
        (tmp_path / "out" / name).write_text(name)
    argv = [str(folders["photos"]), str(folders["near"]), "--against", "near", f"output_dir={tmp_path / 'out'}"]
    assert evaluate_quantitative_metrics.main(argv) == 0
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["reference"] == "near" and "distances" in content["rows"]["photos"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json",
        "metrics.md",
        "mine.png",
        "metrics.csv",
        "earlier_1",
    }
    kept = {path.name: path.read_text() for path in (tmp_path / "out" / "earlier_1").iterdir()}
    assert kept == {name: name for name in earlier}
    assert "held an earlier comparison, which is now in" in capsys.readouterr().err


def test_workers_measure_as_one_process(
    folders: dict[str, Path], tmp_path: Path, pickled_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "BATCH", 4)
    assert run(folders, tmp_path / "two", "num_workers=2") == 0
    monkeypatch.setattr(plain, "spread", spread)
    assert run(folders, tmp_path / "one") == 0
    assert (tmp_path / "two" / "metrics.json").read_bytes() == (tmp_path / "one" / "metrics.json").read_bytes()


def test_mistakes_are_one_sentence(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "settings.json").write_text("{}")
    photos = {"photos": folders["photos"]}
    cases = (
        (photos, [], "two folders"),
        (photos | {"none": tmp_path / "empty"}, [], "fewer than 2 images"),
        (photos | {"generated": tmp_path / "set"}, [], "give only sets, or only folders"),
        (folders, ["--against", "x"], "no set 'x'"),
        (folders, ["--clip", "none"], "--clip"),
        (folders, ["--extractor", "clip"], "needs weights"),
        (folders, ["--num_workers", "0"], "--num_workers must be at least 1, not 0"),
        ({"generated": tmp_path / "set"}, ["extractor=fid"], "plain folders"),
    )
    for sets, flags, words in cases:
        assert run(sets, tmp_path / "out", *flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_hidden_files_and_other_files_are_no_images(folders: dict[str, Path]) -> None:
    assert len(image_files(folders["photos"])) == COUNT


def test_images_of_a_run_are_those_that_its_record_names(folders: dict[str, Path]) -> None:
    folder = folders["near"]
    images = [path.name for path in image_files(folder) if path.parent == folder]
    record = {"localctl": "1.0", "images": images[:2]}
    (folder / "earlier_1").mkdir()
    (folder / "earlier_1" / images[0]).write_bytes((folder / images[0]).read_bytes())
    (folder / "sample.json").write_text(json.dumps(record))
    expected = [folder / name for name in sorted(images[:2])]
    assert image_files(folder) == expected
    others = [path for path in image_files(folder.parent) if folder not in path.parents]
    assert image_files(folder.parent) == sorted(expected + others) and len(others) >= COUNT  # of the folders beside it


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"id": 1, "file_name": "0.png"}], "annotations": []},  # the form of COCO
        {"images": ["0.png"]},
        {"localctl": "1.0", "images": [1]},
        {"localctl": "1.0", "images": None},
        ["0.png"],
        "{",
    ],
)
def test_another_file_of_the_record_s_name_changes_nothing(folders: dict[str, Path], content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folders["near"] / "sample.json").write_text(text)
    assert len(image_files(folders["near"])) == COUNT
