import json
import math

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from localctl.run.logging import BoardTracker, FileTracker, Tracker, read_stats


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


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    tracker = BoardTracker(tmp_path, {})
    tracker.log(5, {"loss": 0.25, "by": [1.0, None], "name": "text"})
    tracker.image(5, "grid", Image.new("RGBA", (4, 3)))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["by/0", "loss"]
    assert events.Scalars("loss")[0].step == 5 and events.Scalars("loss")[0].value == 0.25
    assert (events.Images("grid")[0].width, events.Images("grid")[0].height) == (4, 3)


def test_the_null_tracker_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker()
    tracker.log(1, {"loss": 1.0})
    tracker.image(1, "grid", Image.new("RGB", (1, 1)))
    tracker.close()
    assert list(tmp_path.iterdir()) == []
