"""The comparison of trainings: its order, its table, and the whole command at tiny size."""

import json
from pathlib import Path
from typing import Any

import pytest

from research.benchmarks.command_one import BASELINE, FLOOR, VARIANTS, Job, jobs, main, parse, report

TINY = ["--count", "2", "--num_inference_steps", "1", "--set", "max_train_steps=1", "train_batch_size=1"]


def row(name: str, f1: list[float], **more: Any) -> dict[str, Any]:
    return {"name": name, "seed": 0, "f1": f1, "images": 100, "seconds": 5.0, **more}


def test_all_variants_come_before_the_second_seed_and_what_is_measured_is_left_out(tmp_path: Path) -> None:
    args = parse(["--output_dir", str(tmp_path), "--only", BASELINE, "short", "--seeds", "3", "4"])
    wanted = [Job(FLOOR), Job(BASELINE, 3), Job("short", 3), Job(BASELINE, 4), Job("short", 4)]
    assert jobs(args) == wanted
    (tmp_path / "one.json").write_text(json.dumps({"name": "short", "seed": 3}))
    assert jobs(args) == [job for job in wanted if job != Job("short", 3)]


def test_every_variant_is_a_training_that_can_be_composed() -> None:
    from localctl.api import train_settings

    before = train_settings(*Job(BASELINE, 5).settings)
    for name, choices in VARIANTS.items():
        settings = train_settings(*Job(name, 5).settings) if choices else before
        assert settings.seed == 5 and settings.steps * settings.train_batch_size <= 900 * 16
        assert (settings == before) == (not choices), name


def test_the_table_puts_each_variant_between_base_and_ceiling_and_against_the_baseline() -> None:
    rows = [
        row(FLOOR, [0.0, 0.2], f1_ceiling=[1.0, 0.8]),
        row(BASELINE, [0.5, 0.5]),
        row("short", [0.7, 0.6], images=60, seconds=3.0),
        row("short", [0.9, 0.8], images=60, seconds=4.0) | {"seed": 1},
    ]
    _, _, before, short = report(rows)
    assert before.startswith(f"| {BASELINE} | 0.500 [0.500, 0.500] |  | 0.500 | 1.00 | 5 |")
    assert short.startswith("| short | 0.812 [") and "+0.312 [" in short and "0.687, 0.938 | 0.60 | 4 |" in short
    assert report(rows[1:]) == ["Nothing can be compared yet."]


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--only", "shrot"], "Unknown variant 'shrot'"), (["--parallel", "0"], "--parallel must be at least 1, not 0")],
)
def test_mistakes_are_one_sentence(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output_dir", str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_trains_measures_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--output_dir", str(tmp_path), "--only", BASELINE, "short", "--seeds", "0", *TINY]
    assert main([*command, "--minutes", "0.001"]) == 0
    assert "no time left" in capsys.readouterr().out and not list(tmp_path.glob("*.json"))
    assert main([*command, "data.count=2", "--parallel", "2"]) == 0
    assert len(list(tmp_path.glob("*.json"))) == 3
    printed = capsys.readouterr().out
    assert "| short |" in printed and "failed" not in printed
    assert main([*command, "--report"]) == 0
    assert capsys.readouterr().out == printed[printed.index("| 2 validation") :]
