"""Work spread over Ray workers: results in order, and what becomes of errors and of killed workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from process_helpers import start, wait_for
from set_helpers import SIDE, contents

import localctl
import localctl.evaluation.fid
import localctl.evaluation.generated_set
from localctl.cli import evaluate_fid
from localctl.cluster import connected
from localctl.data import DataConfig
from localctl.evaluation.generated_set import SetGenerator
from localctl.evaluation.settings import FidSettings
from localctl.evaluation.workers import TRIES, spread
from localctl.pipelines import BaseConfig

pytest_plugins = ["evaluation_fixtures"]


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


@pytest.mark.slow
def test_results_come_in_order_also_after_a_worker_was_killed(ray_here: None, tmp_path: Path) -> None:
    make = work_of("killed once", tmp_path)
    results = list(spread(make(), make, range(1, 9), 2))
    assert [number for number, _, _ in results] == list(range(1, 9)) and (tmp_path / "killed").exists()
    assert len({worker for _, worker, _ in results} - {os.getpid()}) >= 2
    assert {folder for _, _, folder in results} == {os.getcwd()}


def test_without_workers_this_process_does_the_work(tmp_path: Path) -> None:
    make = work_of("none", tmp_path)
    results = list(spread(make(), make, (3, 1), None))
    assert [(number, worker) for number, worker, _ in results] == [(3, os.getpid()), (1, os.getpid())]


@pytest.mark.slow
def test_the_error_of_a_piece_is_the_error_of_the_whole(ray_here: None, tmp_path: Path) -> None:
    make = work_of("value", tmp_path)
    done = []
    with pytest.raises(ValueError, match=r"^The number 3 is no good\.$"):
        for number, _, _ in spread(make(), make, range(1, 5), 2):
            done.append(number)
    assert done == [1, 2]


def test_what_cannot_be_spread_is_one_sentence(monkeypatch: pytest.MonkeyPatch, ray_here: None, tmp_path: Path) -> None:
    make = work_of("none", tmp_path)
    with pytest.raises(ValueError, match="No machine of the cluster has a GPU for the device 'cuda'; try"):
        next(spread(make(), make, (1,), 1, "cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="leave it out under torchrun"):
        next(spread(make(), make, (1,), 1))


def test_workers_run_one_thread_and_import_this_package(capfd: pytest.CaptureFixture[str], ray_here: None) -> None:
    """Here, as Ray runs for this file already."""
    handler = signal.getsignal(signal.SIGTERM)
    with connected() as ray:

        def found(batch: dict[str, list[int]]) -> dict[str, list[object]]:
            import localctl as package

            return {"file": [package.__file__], "threads": [os.environ["OMP_NUM_THREADS"]]}

        rows = ray.data.range(2).map_batches(found, batch_size=1).take_all()
    assert {(row["file"], row["threads"]) for row in rows} == {(str(Path(localctl.__file__)), "1")}
    assert ray.is_initialized()  # it was there before
    assert signal.getsignal(signal.SIGTERM) is handler
    shown = capfd.readouterr()
    assert not shown.out and not shown.err


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


@pytest.mark.slow
def test_two_ray_workers_generate_the_bytes_of_one_process(
    arguments: list[str], adapter: str, tmp_path: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, adapter, "num_images=8"]
    assert evaluate_fid.main(["gen", *arguments]) == 0
    one = contents(tmp_path / "fid")
    shutil.rmtree(tmp_path / "fid")
    capsys.readouterr()
    assert evaluate_fid.main(["gen", *arguments, "num_workers=2"]) == 0
    printed = capsys.readouterr()
    assert "8 images generated by 2 workers, " in printed.out and "in each of 2 processes" in printed.out
    assert "batch 4 of 4, images 6 to 7" in printed.out and not printed.err
    assert contents(tmp_path / "fid") == one


def test_workers_measure_as_one_process(
    arguments: list[str], adapter: str, tmp_path: Path, pickled_workers: None
) -> None:
    arguments, made = [*arguments, adapter, "num_images=3"], []
    for workers in ([], ["num_workers=2"]):
        with pytest.MonkeyPatch.context() as patch:
            if not workers:
                for module in (localctl.evaluation.fid, localctl.evaluation.generated_set):
                    patch.setattr(module, "spread", spread)
            for command in ("ref", "gen", "score"):
                assert evaluate_fid.main([command, *arguments, *workers]) == 0
        made.append(contents(tmp_path / "fid"))
        shutil.rmtree(tmp_path / "fid")
    assert made[0] == made[1] and "with_prompts/score_micro_clip.json" in made[0]


def test_a_worker_that_does_not_see_the_set_says_so(sd_folder: Path, photos: Path, tmp_path: Path) -> None:
    data = DataConfig(name="imagefolder", path=str(photos), resolution=SIDE)
    settings = FidSettings(base=BaseConfig(name=str(sd_folder)), data=data, output_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"does not see .*elsewhere.*; choose an output_dir on a disk that all mach"):
        SetGenerator.in_worker(settings, "with_prompts")


@pytest.mark.slow
def test_two_workers_generate_and_score_200_images_as_one_process_also_after_a_kill(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def command(name: str, folder: str, *more: str) -> list[str]:
        options = ["num_images=200", "num_inference_steps=2", "device=cpu", f"output_dir={tmp_path / folder}"]
        return [sys.executable, "evaluate_fid.py", name, "batch_size=8", *options, *more]

    def run(*argv: str) -> None:
        subprocess.run(argv, cwd=root, env=environment, check=True, timeout=900)

    for name in ("ref", "gen", "score"):
        run(*command(name, "one"))
    images = tmp_path / "two" / "with_prompts" / "images"
    first = start(evaluate_fid.main, command("gen", "two", "num_workers=2")[2:])
    wait_for(lambda: images.is_dir() and len(list(images.glob("[0-9]*.png"))) >= 40, first, 300)
    first.kill()
    first.join()
    time.sleep(5)  # its workers end with it
    assert 40 <= len(list(images.glob("[0-9]*.png"))) < 200
    for name in ("ref", "gen", "score"):
        run(*command(name, "two", "num_workers=2"))
    one, two = (contents(tmp_path / folder) for folder in ("one", "two"))
    assert len([name for name in one if "/images/" in name]) == 200
    assert {name: data for name, data in two.items() if not Path(name).name.startswith(".")} == one
    metrics = [sys.executable, "evaluate_quantitative_metrics.py", f"base={tmp_path / 'one' / 'with_prompts'}"]
    figures = []
    for folder, flags in (("alone", []), ("shared", ["--num_workers", "2"])):
        run(*metrics, f"--output_dir={tmp_path / folder}", *flags)
        found = json.loads((tmp_path / folder / "metrics.json").read_text())
        figures.append((found["rows"], found["ids"]))
    assert figures[0] == figures[1] and len(figures[0][1]) == 200
