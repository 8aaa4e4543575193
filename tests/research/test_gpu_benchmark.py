"""The GPU benchmark at tiny size on a CPU: that every part works the day a GPU is there."""

import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState

from research.benchmarks import gpu, gpu_families
from research.benchmarks.gpu import PARTS
from research.benchmarks.gpu_parts import Bench
from research.benchmarks.gpu_report import BEGIN, END, read, report, write_page
from research.benchmarks.timing import Deadline
from research.flags import PAGES, RESULTS

FLUX = ("flux_training_512", "flux_controls_512")
QUICK = ("limits", "training", "controls_sd15", "encoders", *FLUX)
STORED = sorted((RESULTS / "gpu").glob("*.jsonl"))


def run(folder, *parts):
    status = gpu.main(["--tiny", "--device", "cpu", "--output_dir", str(folder), "--parts", *parts])
    return status, [json.loads(line) for line in (folder / gpu.FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows; other tests may then use another precision, which accelerate keeps for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield run(tmp_path_factory.mktemp("gpu"), *QUICK)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_every_part_works(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    status, rows = run(tmp_path, *PARTS)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert status == 0
    assert {row["part"] for row in rows} == {"machine", *PARTS}


def test_flux_is_measured_as_the_other_bases_are(measured):
    _, rows = measured
    plain, checkpointed = of_part(rows, FLUX[0])
    assert plain["tflop_per_image"] == checkpointed["tflop_per_image"] > 0
    assert checkpointed["gib_counted"] <= plain["gib_counted"] and plain["times"] == 1
    names = [row["control"] for row in of_part(rows, FLUX[1])]
    assert names == ["none", "adapter", "bias", "dense", "spacetime"]
    assert "| flux1_dev 64 px, batch 1 | adapter, gradient checkpointing |" in report(rows)


def test_a_step_that_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(gpu_families, "_room", lambda device: 0.0)
    rows = list(gpu_families.TokenTraining("flux1_dev", 64).rows(Bench(torch.device("cpu"), True, None, Deadline())))
    assert [row["skipped"].split(",")[0] for row in rows] == ["adapter", "adapter"]


def test_a_group_of_parts_has_a_name():
    options = gpu.parse(["--tiny", "--parts", "limits", "flux"])
    assert options.parts == ["limits", *gpu_families.PARTS]


def of_part(rows, part):
    return [row for row in rows if row["part"] == part]


def test_every_part_yields_rows(measured):
    status, rows = measured
    assert status == 0
    assert [row["part"] for row in rows if "error" in row or "skipped" in row] == []
    assert {row["part"] for row in rows} == {"machine", *QUICK}
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


def test_the_page_has_the_tables_of_the_stored_rows():
    assert report(read(*STORED)) in (PAGES / "scaling.md").read_text()


def test_rows_of_several_runs_say_which_run(measured, tmp_path):
    _, rows = measured
    for number in (1, 2):
        noted = [{**row, "note": f"note {number}"} if row["part"] == "machine" else row for row in rows]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, noted)))
    text = report(read(tmp_path / "1.jsonl", tmp_path / "2.jsonl"))
    assert [text.count(f"(note {number})") for number in (1, 2)] == [1, 1]
    for number in (1, 2):
        assert text.count(f"\n| {number} |") == sum(bool({"variant", "control", "what"} & row.keys()) for row in rows)
        assert f"Run {number}, {rows[0]['card']}" in text


def test_tables_are_written_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert gpu.main(["--report", *map(str, STORED), "--page", str(page)]) == 0
    assert page.read_text() == f"before\n{BEGIN}\n{report(read(*STORED))}\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no place for the tables"):
        write_page(page, "text")
