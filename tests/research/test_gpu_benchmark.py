"""The GPU benchmark at tiny size on a CPU: that every part works the day a GPU is there."""

import json
import math

import pytest

from research.benchmarks import gpu
from research.benchmarks.gpu_parts import PARTS
from research.benchmarks.gpu_report import report

# The other parts differ from these in sizes, batches and settings alone.
DIFFERENT = (
    "limits", "training", "training_compiled", "training_sdxl", "controls_sd15", "controls_compiled",
    "encoders", "profile",
)  # fmt: skip


def run(folder, *parts):
    status = gpu.main(["--tiny", "--device", "cpu", "--output_dir", str(folder), "--parts", *parts])
    return status, [json.loads(line) for line in (folder / gpu.FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run(tmp_path_factory.mktemp("gpu"), *DIFFERENT)


def of_part(rows, part):
    return [row for row in rows if row["part"] == part]


def test_every_part_yields_rows(measured):
    status, rows = measured
    assert status == 0
    assert [row["part"] for row in rows if "error" in row or "skipped" in row] == []
    assert {row["part"] for row in rows} == {"machine", *DIFFERENT}
    numbers = [value for row in rows[1:] for value in row.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)


def test_the_steps_are_compared_to_the_plain_one(measured):
    _, rows = measured
    plain, cached, live = of_part(rows, "training")
    assert [row["variant"] for row in (plain, cached, live)] == ["plain step", "cached", "live"]
    assert plain["times"] == 1 and {row["faster_than"] for row in (plain, cached, live)} == {"plain step"}
    assert cached["tflop_per_image"] < live["tflop_per_image"] < plain["tflop_per_image"]
    for row in (plain, cached, live):
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]


def test_the_overhead_is_that_over_a_run_without_controls(measured):
    _, rows = measured
    none, *others = of_part(rows, "controls_sd15")
    assert none["control"] == "none" and none["overhead"] == 0
    assert next(row for row in others if row["control"] == "guidance")["overhead"] > 0.3


def test_the_report_has_a_line_for_each_row(measured):
    _, rows = measured
    text = report(rows)
    for row in rows:
        shown = row.get("variant") or row.get("control") or row.get("operation") or row.get("what")
        assert shown is None or shown in text
    assert "figures mean nothing" in text and "Not measured" not in text


def test_a_part_that_fails_is_recorded_and_the_next_one_measured(tmp_path, monkeypatch, capsys):
    def broken(bench):
        yield {"name": "before"}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "PARTS", {**PARTS, "training": (broken, 1)})
    status, rows = run(tmp_path, "training", "limits")
    assert status == 1
    assert [row["part"] for row in rows] == ["machine", "training", "training", "limits", "limits"]
    assert rows[2]["error"] == "RuntimeError: out of memory"
    assert "training: RuntimeError: out of memory" in report(rows)


def test_a_part_that_would_not_end_in_time_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {name: (part, 3600) for name, (part, _) in PARTS.items()})
    options = gpu.parse(["--tiny", "--device", "cpu", "--output_dir", str(tmp_path), "--parts", "limits"])
    options.tiny = False  # tiny runs are never skipped
    assert gpu.measure(options) == 0
    [_, skipped] = [json.loads(line) for line in (tmp_path / gpu.FILE).read_text().splitlines()]
    assert skipped["part"] == "limits" and skipped["skipped"].startswith("3600 s needed")


def test_without_a_gpu_only_tiny_shapes_are_measured(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--device", "cpu"])
    assert "There is no GPU here" in capsys.readouterr().err
