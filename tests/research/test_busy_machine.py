"""The measurement beside busy programs: every training takes its turns, and leaves nothing running."""

import re

import pytest

from research.benchmarks.busy_machine import WAYS, main


@pytest.mark.slow
def test_each_way_is_measured_in_every_turn(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--busy", "0", "1", "--rounds", "2", "--steps", "1", "--train_batch_size", "2"]
    assert main(flags) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| beside 0 busy processes", "| beside 1 busy processes"]
    assert all(len(re.findall(r"\| [1-9]\d* \(\d+ to \d+\)", row)) == len(WAYS) for row in rows)


def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "0"]) == 2
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
