import importlib.machinery
import json
import math
import sys
import threading
import time

import pytest
from log_helpers import logged
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from localctl.training import trackers as logging
from localctl.training.trackers import BoardTracker, FileTracker, Tracker, check_report_to, make_tracker, read_stats


def test_rows_are_json_without_nan(tmp_path):
    tracker = FileTracker(tmp_path)
    tracker.log(1, {"loss": 0.1, "parts": [1.0, None, math.nan], "odd": math.inf})
    tracker.close()
    text = (tmp_path / "stats.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "loss": 0.1, "parts": [1.0, None, None], "odd": None,
    }  # fmt: skip
    assert not (tmp_path / "logs").exists()


def test_a_row_is_on_disk_at_once(tmp_path):
    tracker = FileTracker(tmp_path)
    tracker.log(1, {"loss": 1 / 3})
    assert read_stats(tmp_path) == [{"step": 1, "loss": 1 / 3}]
    tracker.close()


def test_going_on_cuts_back_what_came_after(tmp_path):
    rows = "".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6))
    (tmp_path / "stats.jsonl").write_text(rows + '{"step": 8, "lo')
    tracker = FileTracker(tmp_path, start=4)
    tracker.log(6, {"new": 1})
    tracker.close()
    assert read_stats(tmp_path) == [{"step": 2}, {"step": 4}, {"step": 6, "new": 1}]


def test_tensorboard_gets_numbers_and_images(tmp_path):
    tracker = BoardTracker(tmp_path, {})
    tracker.log(5, {"loss": 0.25, "by": [1.0, None], "name": "text"})
    tracker.image(5, "grid", Image.new("RGBA", (4, 3)))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["by/0", "loss"]
    assert events.Scalars("loss")[0].step == 5 and events.Scalars("loss")[0].value == 0.25
    assert (events.Images("grid")[0].width, events.Images("grid")[0].height) == (4, 3)


def test_a_disk_that_is_full_for_tensorboard_is_one_sentence(tmp_path, monkeypatch, capfd):
    """Its thread, which writes, would print a traceback of its own."""
    before, said = threading.excepthook, logged()
    tracker = make_tracker("tensorboard", tmp_path, {})

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    for step in range(1, 200):
        tracker.log(step, {"loss": 0.5})
        time.sleep(0.01 if not said else 0)
    tracker.close()
    assert len(said) == 1 and "warning: TensorBoard recorded nothing" in said[0] and "No space left" in said[0]
    assert "Traceback" not in capfd.readouterr().err and threading.excepthook is before
    assert len(read_stats(tmp_path)) == 199


def test_the_null_tracker_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker()
    tracker.log(1, {"loss": 1.0})
    tracker.image(1, "grid", Image.new("RGB", (1, 1)))
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def board(folder):
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return events


def test_tensorboard_passes_over_what_lay_beyond_the_step_of_resuming(tmp_path):
    first = BoardTracker(tmp_path, {})
    for step in range(1, 6):
        first.log(step, {"loss": float(step)})
        first.image(step, "grid", Image.new("RGB", (2, 2)))
    first.close()
    second = BoardTracker(tmp_path, {}, start=3)
    second.log(4, {"loss": 40.0})
    second.close()
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [e.step for e in board(tmp_path).Images("grid")] == [1, 2, 3]


def test_hyperparameters_are_flat_and_of_the_run_itself(tmp_path):
    tracker = BoardTracker(tmp_path, {"loss.weight": 0.5, "seed": 3, "mask.box": [0, 1], "base.revision": None})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert [p.is_file() for p in (tmp_path / "logs").iterdir()] == [True]
    content = board(tmp_path).PluginTagToContent("hparams")
    assert b"loss.weight" in b"".join(content.values()) and b"[0, 1]" in b"".join(content.values())


class FakeWandb:
    """Stand-in for the parts of the package that are used."""

    def __init__(self):
        self.calls = []
        self.Image = lambda image: ("image", image.size)

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def __getattr__(self, name):
        return lambda *values, **options: self.calls.append((name, values, options))


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.mark.parametrize("report_to", ["wandb", "all"])
def test_wandb_gets_settings_numbers_and_images_and_the_same_run_on_resuming(tmp_path, wandb, report_to):
    check_report_to(report_to)
    for start in (0, 2):
        tracker = make_tracker(report_to, tmp_path, {"seed": 3}, start=start)
        tracker.log(start + 1, {"loss": 0.5, "by": [1.0, None], "odd": math.nan})
        tracker.image(start + 1, "grid", Image.new("RGB", (3, 4)))
        tracker.close()
    first, second = [options for name, *rest in wandb.calls if name == "init" for options in rest]
    assert first["project"] == "localctl" and first["config"] == {"seed": 3} and first["resume"] == "allow"
    assert first["id"] == second["id"] and len(first["id"]) == 8
    logged = [values[0] for name, values, _ in (c for c in wandb.calls if c[0] == "log")]
    assert logged[:2] == [{"step": 1, "loss": 0.5, "by/0": 1.0}, {"step": 1, "grid": ("image", (3, 4))}]
    assert sum(c[0] == "finish" for c in wandb.calls) == 2
    assert [row["step"] for row in read_stats(tmp_path)] == [1, 3]
    assert (tmp_path / "logs").exists() == (report_to == "all")


def test_wandb_is_told_how_the_run_is_called(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    named = {
        "project": "mine",
        "name": "first",
        "group": "edges",
        "tags": ("a", "b"),
        "notes": "a try",
        "job_type": None,
    }
    make_tracker("wandb", tmp_path, {}, wandb=named).close()
    make_tracker("wandb", tmp_path, {}, wandb=dict.fromkeys(named)).close()
    first, second = [options for name, *rest in wandb.calls if name == "init" for options in rest]
    assert {name: first[name] for name in named if name in first} == {k: v for k, v in named.items() if k != "job_type"}
    assert second["project"] == "of the environment" and "name" not in second


def test_names_for_wandb_that_would_go_nowhere_are_refused(monkeypatch):
    for report_to, installed in (("tensorboard", True), ("none", True), ("all", False)):
        monkeypatch.setattr(logging, "_has_wandb", lambda installed=installed: installed)
        check_report_to(report_to, {"name": None})
        with pytest.raises(ValueError, match="wandb.name and wandb.tags given, but report_to=.*; set report_to=wandb"):
            check_report_to(report_to, {"name": "x", "tags": ("y",), "group": None})
    monkeypatch.setattr(logging, "_has_wandb", lambda: True)
    for report_to in ("all", "wandb"):
        check_report_to(report_to, {"name": "x"})


def test_wandb_that_is_not_installed_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "_has_wandb", lambda: False)
    with pytest.raises(ValueError, match="report_to=wandb needs the package wandb; `pip install wandb`") as error:
        check_report_to("wandb")
    assert "\n" not in str(error.value)
    for name in ("all", "tensorboard", "none"):
        check_report_to(name)
    make_tracker("all", tmp_path, {}).close()
    assert (tmp_path / "logs").exists()
