"""Work spread over Ray workers: results in order, the same bytes as one process, and what happens to a killed worker."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from localctl.evaluation.workers import TRIES, spread


def work_of(kind: str, folder: Path) -> Callable[[], Callable[[int], tuple[int, int, str]]]:
    """Return what makes the work of a worker: of ``kind`` at number 3. It is pickled by value, as Ray's workers do not
    import this file."""

    def make() -> Callable[[int], tuple[int, int, str]]:
        def work(number: int) -> tuple[int, int, str]:
            if number == 3 and kind == "value":
                raise ValueError("The number 3 is no good.")
            if number == 3 and kind == "bug":
                raise KeyError("three")
            if number == 3 and (kind == "killed" or (kind == "killed once" and not (folder / "killed").exists())):
                (folder / "killed").write_text("")
                os.kill(os.getpid(), 9)
            time.sleep(0.1 * (number % 2))  # the second of a pair would come first
            return number, os.getpid(), os.getcwd()

        return work

    return make


def test_results_come_in_order_also_after_a_worker_was_killed(ray_here: None, tmp_path: Path) -> None:
    make = work_of("killed once", tmp_path)
    results = list(spread(make(), make, range(1, 9), 2))
    assert [number for number, _, _ in results] == list(range(1, 9)) and (tmp_path / "killed").exists()
    assert len({worker for _, worker, _ in results} - {os.getpid()}) >= 2
    assert {folder for _, _, folder in results} == {os.getcwd()}
    assert [number for number, worker, _ in spread(make(), make, (1, 2), None) if worker == os.getpid()] == [1, 2]


def test_the_error_of_a_piece_is_the_error_of_the_whole(ray_here: None, tmp_path: Path) -> None:
    make = work_of("value", tmp_path)
    with pytest.raises(ValueError, match=r"^The number 3 is no good\.$"):
        list(spread(make(), make, range(1, 5), 1))


def test_what_cannot_be_spread_is_one_sentence(monkeypatch: pytest.MonkeyPatch, ray_here: None, tmp_path: Path) -> None:
    make = work_of("none", tmp_path)
    with pytest.raises(ValueError, match="No machine of the cluster has a GPU for the device 'cuda'; try"):
        next(spread(make(), make, (1,), 1, "cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="leave it out under torchrun"):
        next(spread(make(), make, (1,), 1))


@pytest.mark.slow
def test_what_always_kills_its_worker_is_named(ray_here: None, tmp_path: Path) -> None:
    make = work_of("killed", tmp_path)
    with pytest.raises(OSError, match=f"^The work at 3 killed its worker {TRIES} times.*the same command goes on"):
        list(spread(make(), make, range(1, 5), 2))


@pytest.mark.slow
def test_a_bug_in_a_worker_keeps_its_traceback(ray_here: None, tmp_path: Path) -> None:
    make = work_of("bug", tmp_path)
    with pytest.raises(Exception, match=r"in work[\s\S]*KeyError: 'three'"):
        list(spread(make(), make, range(1, 5), 1))
