"""The study of space-time attention: figures of images with known content, and a run that resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localctl.control.spacetime import SpaceTimeAttention
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.micro.detect import VERSION
from localctl.weight_search.weights import OptimizedSpaceTime
from research import harness
from research.spacetime import study
from research.spacetime.__main__ import main
from research.spacetime.report import against_report, measure, relation_report
from research.spacetime.study import controls_of_rows, layout_source, other_run, relation_cases, true_layout

FAST = ["--count", "2", "--optimised", "1", "--num_inference_steps", "2", "--set", "optimised.epochs=1"]


def test_the_cases_state_relations_and_their_layouts_are_the_scenes() -> None:
    cases = relation_cases(5, layout_source("true"))
    assert len({case.item.index for case in cases}) == len({case.seed for case in cases}) == 5
    for case in cases:
        assert case.item.relation is not None and case.layout == true_layout(case.item)
        assert case.layout.prompt == case.item.caption and case.layout.size == (128, 128)
        masks = case.layout.masks((128, 128))[:, 0]
        for shape, region in zip(case.item.masks, masks, strict=True):
            assert (shape > 0.5).any() and bool(region[torch.from_numpy(shape > 0.5)].all())
        assert all(region.prompt in (f"a {region.phrase}", f"an {region.phrase}") for region in case.layout.regions)


def test_figures_of_images_with_known_content() -> None:
    clip = Clip(MICRO_CLIP)
    cases = relation_cases(6, layout_source("true"))
    seen = np.array([measure(case.item.image, case.item, case.layout, clip) for case in cases])
    assert seen[:, [0, 1, 2, 4]].mean() > 0.9  # the scenes themselves, as far as the reader reads
    case = next(case for case, row in zip(cases, seen, strict=True) if row[:3].tolist() == [1, 1, 1])
    mirrored = measure(np.ascontiguousarray(case.item.image[::-1, ::-1]), case.item, case.layout, clip)
    assert mirrored[2] == mirrored[4] == 0
    blank = measure(np.full((128, 128, 3), 255, np.uint8), case.item, case.layout, clip)
    assert blank[0] == blank[2] == blank[4] == 0 and np.isnan(blank[1])


def test_the_report_pairs_what_both_rows_have() -> None:
    plain = np.array([[0.0, np.nan, 0, 20], [1, 1, 0, 22], [0, 0, 1, 24]])
    tables = {"plain": plain, "constant": plain + 0.5, "scheduled": plain, "optimised": np.full((3, 4), np.nan)}
    tables["optimised"][:2] = plain[:2] + 1
    text, figures = relation_report(tables, 2)
    gains = figures["differences"]
    assert gains["optimised - constant"]["CLIP score"]["value"] == 0.5
    assert gains["optimised - plain"]["attribute binding"]["n"] == 1
    assert gains["scheduled - plain"]["relation"]["value"] == 0 and "no difference" in text
    assert figures["means of the shared"]["plain"]["CLIP score"]["value"] == 21
    assert "| optimised | 2 |" in text and "On the 2 captions that all rows share" in text


def test_a_run_is_compared_with_another_caption_by_caption(tmp_path: Path) -> None:
    cases = relation_cases(2, layout_source("true"))
    path = tmp_path / "results.json"
    weights = {"unet": "1"}
    about: dict[str, Any] = {"reader": VERSION, "settings": {"weights_sha256": weights, "layouts": {}}}
    about["settings"]["layouts"] = {case.id: [] for case in [*cases, *relation_cases(3, layout_source("true"))[2:]]}
    samples = {"plain": [[0, 0.5, 0, 20], [1, None, 0, 22], [0, 0, 0, 0]], "optimised": [[None] * 4] * 3}
    path.write_text(json.dumps({"provenance": about, "samples": samples}))
    others = other_run(path, cases, weights)
    here = {"constant": np.array([[1.0, 0.5, 1, 20], [1, 1, 1, 26]]), "scheduled": np.full((2, 4), np.nan)}
    (row,) = against_report(here, others).splitlines()[3:]  # rows without values are left out
    assert re.findall(r"(\S+) \[\S+ \S+\] of (\d)", row) == [
        ("+0.500", "2"),
        ("+0.000", "1"),
        ("+1.000", "2"),
        ("+2.000", "2"),
    ]
    with pytest.raises(ValueError, match="has 3 captions, and not all 4 of this run; lower --count"):
        other_run(path, relation_cases(4, layout_source("true")), weights)
    with pytest.raises(ValueError, match="was made with another weights; choose the results of another run"):
        other_run(path, cases, {"unet": "2"})
    path.write_text('{"samples": {}}')
    with pytest.raises(ValueError, match="is no result of research.spacetime"):
        other_run(path, cases, weights)


def test_settings_reach_their_rows() -> None:
    rows = controls_of_rows(["weight=0.7", "scheduled.schedule=cosine", "optimised.learning_rate=0.1"], "micro")
    assert rows == {
        "plain": (),
        "constant": (SpaceTimeAttention(weight=0.7, hide_phrases=True, end=0.7, template="{}"),),
        "scheduled": (SpaceTimeAttention(weight=0.7, schedule="cosine", template="{}"),),
        "optimised": (OptimizedSpaceTime(weight=0.7, learning_rate=0.1, hide_phrases=True, end=0.7, template="{}"),),
    }


@pytest.mark.slow
def test_a_run_is_continued_and_repeats_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    flags = [*FAST, "--output_dir", str(folder)]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "report.md").read_text().strip() and (folder / "sheet.png").is_file()
    images = {path: path.read_bytes() for path in folder.glob("images/*/*.png")}
    assert len(images) == 7 and len(set(images.values())) > 4
    found = json.loads((folder / "weights" / "000000.json").read_text())
    assert np.shape(found["weights"]) == (2, 2) and len(found["losses"]) == 1
    results = json.loads((folder / "results.json").read_text())
    assert results["provenance"]["n_fake"]["optimised"] == 1 and results["samples"]["optimised"][1] == [None] * 5
    lost = folder / "images" / "optimised" / "000000.png"
    lost.unlink()
    made: list[int] = []
    generate = harness.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(len(args[1]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(harness, "generate", counted)
    assert main(flags) == 0
    assert made == [1] and {path: path.read_bytes() for path in images} == images
    (folder / "results.json").rename(tmp_path / "all.json")
    capsys.readouterr()
    assert main([*flags, "--rows", "constant", "--against", str(tmp_path / "all.json")]) == 0
    assert made == [1]
    report = capsys.readouterr().out
    assert "| plain | 0 | undefined" in report and "| constant - optimised | " in report
    assert "| constant - constant | +0.000 [+0.000, +0.000] of 2, no difference" in report
    assert main([*flags, "--num_inference_steps", "3"]) == 2
    assert "was made with another num_inference_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--optimised", "3"], "--optimised 3 is more than --count 2"),
        (["--set", "plain.weight=1"], "row 'plain' has no control"),
        (["--set", "wieght=1"], "No control of this run has a setting 'wieght'"),
        (["--set", "weight=2"], "convex mix must lie in"),
        (["--layout", "auto", "--layout_predictor", "nowhere"], "layout predictor"),
        (["--device", "tpu9"], "cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_generated(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "load_pipeline", None)
    assert main([*FAST, "--output_dir", "out", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and re.search(message, printed), printed
