"""The runs that the studio shows, and the one that it trains."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from localctl.studio.training_runs import (
    Trainer,
    adapters_of_runs,
    curve_points,
    find_run,
    list_runs,
    run_adapters,
    sheet_files,
)
from localctl.studio.training_tab import _or_nothing, _sheet, _shown


def make_run(folder: Path, steps: int = 3) -> Path:
    """A folder with what a run leaves: its log, a sheet, a checkpoint and the finished adapter."""
    rows = [{"step": step, "denoising": 1 / step, "local_raw": None} for step in range(1, steps + 1)]
    (folder / "validation").mkdir(parents=True)
    (folder / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "deno')
    Image.new("RGB", (8, 8)).save(folder / "validation" / f"step-{steps:06d}.png")
    for place in (folder / "adapter", folder / f"checkpoint-{steps}" / "adapter"):
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
    return folder


def test_runs_are_found_below_the_folder_and_named_by_their_path(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "series" / "b")
    (tmp_path / "not_a_run").mkdir()
    make_run(tmp_path / ".hidden" / "c")
    assert set(list_runs(tmp_path)) == {"a", "series/b"}
    assert find_run(tmp_path, "series/b") == tmp_path / "series" / "b"
    assert list_runs(tmp_path / "absent") == {}
    assert list(list_runs(tmp_path / "a").values()) == [tmp_path / "a"]  # the folder of one run


@pytest.mark.parametrize("name", ["..", "a/..", "/etc", "not_a_run", "", "series"])
def test_a_name_that_is_not_listed_is_refused(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="There is no run"):
        find_run(tmp_path, name)


def test_a_run_has_curves_sheets_and_adapters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=3)
    assert curve_points(run) == {"denoising loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)]}  # others are empty or incomplete
    assert list(sheet_files(run)) == [3]
    assert list(run_adapters(run)) == ["finished", "step 3"]
    assert adapters_of_runs(tmp_path)["a: step 3"] == run / "checkpoint-3" / "adapter"


def test_a_run_that_is_gone_and_a_sheet_that_is_half_written_are_one_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=3)
    assert _sheet(tmp_path, ["a"], 3) is not None
    sheet = run / "validation" / "step-000003.png"
    sheet.write_bytes(sheet.read_bytes()[:40])
    with pytest.warns(UserWarning, match="The sheet of step 3 cannot be read; if it is being written now, look again"):
        assert len(_shown(tmp_path, ["a"])) == 8  # the curves are there all the same
    shutil.rmtree(run)
    with pytest.warns(UserWarning, match="There is no run 'a'; choose one of the list"):
        assert _or_nothing(1)(lambda step: _sheet(tmp_path, ["a"], step))(3) == gr.skip()
    assert _shown(tmp_path, ["a"])[0]["choices"] == []


def test_nothing_runs_at_first(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    assert trainer.progress() is None and not trainer.running
    with pytest.raises(ValueError, match="No training is running"):
        trainer.stop()
    trainer.close()


@pytest.mark.slow
def test_a_quick_run_is_followed_and_stopped_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")  # the server's terminal shows no bars; the page follows one all the same
    trainer = Trainer(tmp_path)
    try:
        assert trainer.start("data.count=32", "validation.count=2") == "quick-1"
        with pytest.raises(ValueError, match="quick-1 is still training"):
            trainer.start()
        for _ in range(600):
            progress = trainer.progress()
            assert progress is not None and progress.running, progress
            if progress.step >= 2:
                break
            time.sleep(0.2)
        assert progress is not None
        assert (progress.run, progress.of, progress.doing) == ("quick-1", 100, "training")
        trainer.stop()
        while trainer.running:
            time.sleep(0.1)
        ended = trainer.progress()
        assert ended is not None and ended.doing == "stopped, with a checkpoint"
        assert len(run_adapters(tmp_path / "quick-1")) == 1
        assert trainer.start("max_train_steps=0") == "quick-2"  # an error is told
        while trainer.running:
            time.sleep(0.1)
        ended = trainer.progress()
        assert ended is not None and ended.doing.startswith("ended with an error: ")
    finally:
        trainer.close()
