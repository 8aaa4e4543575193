from pathlib import Path

import pytest

from localctl.cli import train as train_adapter
from localctl.training.trackers import read_stats

ROOT = Path(__file__).parents[2]


def tiny(base, output_dir, *more):
    return [
        f"base={base}", "--output_dir", str(output_dir), "data.count=8", "--train_batch_size", "2",
        "--max_train_steps", "2", "--validation_steps", "2", "logging_steps=1", "validation.count=2",
        "validation.num_inference_steps=2", *more,
    ]  # fmt: skip


def test_trains_from_a_command_line_and_resumes(sd_folder, tmp_path, capsys):
    assert train_adapter.main(tiny(sd_folder, tmp_path)) == 0
    assert "Done" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "config.json").exists() and (tmp_path / "README.md").exists()
    more = ("--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    assert train_adapter.main(tiny(sd_folder, tmp_path, *more)) == 0
    assert [row["step"] for row in read_stats(tmp_path) if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["loss.wieght=1"], ["loss.weight"]),
        (["condition=lineart"], ["lineart"]),
        (["condition.kind=lineart"], ["lineart", "canny"]),
        (["base=./missing"], ["missing"]),
        (["--train_batch_size", "0"], ["train_batch_size"]),
        (["--resume_from_checkpoint", "nowhere"], ["nowhere"]),
        (["mask.min_area=2"], ["min_area"]),
        ([f"output_dir={__file__}/out"], ["be written to", "--output_dir"]),
        (["adapter.downscale_factor=0"], ["downscale_factor"]),
        (["adapter.channels=[1, 2, 3, 4]"], ["channels"]),
        (["mask=fixed", "mask.box=[0.5, 0.5, 0.501, 0.501]"], ["box"]),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(sd_folder, tmp_path, capsys, argv, words):
    base = [] if any(a.startswith("base=") for a in argv) else [f"base={sd_folder}"]
    assert train_adapter.main([*base, f"output_dir={tmp_path / 'out'}", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert not (tmp_path / "out").exists()


def test_help(capsys):
    assert train_adapter.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--resume_from_checkpoint" in out or "resume_from_checkpoint=" in out
    assert "base=flux|flux2|micro|" in out
