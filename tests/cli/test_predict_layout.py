"""`python -m localctl.layout_predictor`, its report, `sample.py --layout auto`, and the shipped weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localctl.cli import sample
from localctl.cli.sample import parse
from localctl.jobs.prepare import prepare
from localctl.layout_io import load_layout
from localctl.layout_predictor import load_predictor
from localctl.layout_predictor.__main__ import main
from localctl.layout_predictor.model import WEIGHTS
from research.layout_predictor import report
from research.layout_predictor.captions import MARGIN
from research.layout_predictor.data import MicroLayouts
from research.layout_predictor.measure import held_out_captions, relation_rate

ROOT = Path(__file__).parents[2]
BED = "The silver bed was situated to the right of the white couch."


def test_prints_positions_and_boxes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, scene = tmp_path / "new" / "layout.png", tmp_path / "scene.json"
    assert main([BED, "--output", str(picture), "--save", str(scene), "--chunker", "rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    layout = load_layout(scene)
    assert layout == load_predictor().predict(BED, chunker="rules")
    for line, region, words in zip(lines, layout.regions, ("The silver bed", "the white couch"), strict=False):
        ((x0, y0, x1, y1),) = region.boxes
        assert line.startswith(
            f"{words} position: ({(x0 + x1) / 2:.3f}, {(y0 + y1) / 2:.3f}) box: ({x0:.3f}, {y0:.3f}, "
        )
    assert lines[2:] == [str(picture), str(scene)]
    bed, couch = (region.boxes[0] for region in layout.regions)
    assert bed[0] + bed[2] > couch[0] + couch[2], "to the right"
    drawn = np.asarray(Image.open(picture))
    assert drawn.shape[1] >= 320 and (drawn != 255).any()


def test_several_prompts_are_one_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "sheet.png"
    assert main(["two cats above a dog", "a kite", "--seed", "3", "--output", str(picture), "--chunker", "rules"]) == 0
    assert capsys.readouterr().out.count("position") == 4
    assert Image.open(picture).width > 2 * 320


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["of the"], "no object"),
        ([BED, "--predictor", "nowhere"], "nowhere"),
        ([BED, "--height", "100", "--width", "100"], "multiple of 8"),
        ([BED, "--height", "64"], "both height and width"),
        ([BED, BED, "--save", "x.json"], "one prompt"),
        ([BED, "--seed", "x"], "--seed"),
        ([BED, "--output", "layout.xyz"], "layout.xyz"),
        ([], "prompt"),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("python -m localctl.layout_predictor: ")


def test_shipped_weights_are_small_and_know_relations() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 8 * 2**20
    model = load_predictor()
    for kind, least in (("training", 0.97), ("held_out", 0.9)):
        captions = held_out_captions(MicroLayouts("test", 10**6), 40, kind, 1, MARGIN)
        assert relation_rate(model, captions) >= least, kind


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--count", "6", "--output", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "report.json").read_text())
    assert set(result["sets"]) == set(result["drawn"]) and "unseen families (6) | most likely" in out
    row = result["sets"]["unseen families"]
    low, high = row["interval"]
    assert 0 <= low <= row["relations"] <= high <= 1 and row["sentences"] == 6 and row["inside"] == 1
    assert sum(number for _, number in row["families"].values()) == 6
    assert "relations" not in result["sets"]["lists"]
    assert all(len(values) == 2 for values in result["nll"]["lists"].values())
    assert report.main(["--count", "0"]) == 2


def test_sample_predicts_layouts_of_its_prompts(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = "a cat to the left of a dog"
    argv = ["--layout", "auto", "--prompt", prompt, "--base", str(sd_folder), "--num_inference_steps", "2"]
    job = prepare(parse(argv))
    assert [layout.regions for layout in job.layouts] == [load_predictor().predict(prompt).regions]
    other = prepare(parse([*argv, "--layout_seed", "1"])).layouts[0]
    assert other.regions != job.layouts[0].regions
    assert sample.main([*argv, "--output_dir", "first", "--seeds", "0", "1"]) == 0
    assert load_layout("first/inputs/layout_0.json").regions == job.layouts[0].regions
    monkeypatch.setattr("localctl.layout_predictor.model.load_predictor", lambda: pytest.fail("not predicted again"))
    assert sample.main(["--from_json", "first/sample.json", "--output_dir", "again"]) == 0
    for name in ("00_seed0.png", "00_seed1.png"):
        pair = [np.asarray(Image.open(f"{folder}/{name}")) for folder in ("first", "again")]
        assert np.array_equal(*pair)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--layout", "auto"], "give --prompt"),
        (["--layout", "auto", "scene.json", "--prompt", "a cat"], "cannot be combined with other layouts"),
        (["--layout", "auto", "--prompt", "of the"], "no object"),
        (["--layout", "scene.json", "--layout_seed", "1"], "--layout auto"),
        (["--prompt", "a", "--adapter", "x", "--layout_seed", "0"], "--layout"),
    ],
)
def test_flags_of_sample_that_do_not_go_together(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_nothing_is_written_into_the_working_folder_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["a cat BREAK a dog"]) == 2
    assert "has 'BREAK', syntax of other tools; place parts" in capsys.readouterr().err
    assert main(["(a cat:1.2) and a dog, no people", "--chunker", "rules"]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [
        "outputs"
    ] and "outputs/layout_predictor/layout.png" in printed
    assert printed.count("position") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 10**8}, "layers of a layout predictor must be a whole number"),
        ({"layers": 10**5}, "too many weights"),
        ({"width": 0}, "width of a layout predictor"),
        ({"buckets": 10**6, "width": 10**6}, "too many weights"),
        ({"heads": "4"}, "heads of a layout predictor .* not '4'"),
        ({"width": 48, "heads": 4}, "cannot be loaded"),
    ],
)
def test_predictors_of_anybody_are_bounded(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=words) as error:
        load_predictor(tmp_path / "own")
    assert str(tmp_path / "own") in str(error.value) and "\n" not in str(error.value)


def test_predictors_of_nan_are_refused(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "own")
    predictor = load_predictor()
    predictor.head.bias.fill_(math.nan)
    predictor.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        load_predictor(tmp_path / "own")
