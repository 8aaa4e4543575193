"""Launchers: which one started this process, what MPI calls its processes, and one voice for an error of several."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localctl import api
from localctl.cli import evaluate_fid, program, sample, train
from localctl.distributed import LostProcess
from localctl.launchers import _is_accelerate, launcher, read_launcher, tells
from localctl.messages import fail

OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"SIZE": "4", "RANK": "3"}.items()}
LOCAL = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
JOINED = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_torchrun_mpirun_and_accelerate_are_known_by_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    several = {"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no", "OMPI_COMM_WORLD_SIZE": "2"}
    for name in several:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("localctl.launchers._is_accelerate", lambda pid: True)
    assert launcher() is None
    for name, value in several.items():
        with monkeypatch.context() as one:
            one.setenv(name, value)
            assert launcher() == os.getppid(), name
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")  # the only process
    assert launcher() is None


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the system does not say what runs")
def test_who_sets_the_variables_of_accelerate_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that is left, as after nohup, must not stop the training."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launcher() is None  # pytest's own parent
    found = []
    for name in ("/env/bin/accelerate", "bash"):
        process = subprocess.Popen([name, "30"], executable="/bin/sleep")
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():  # until the program is loaded
            time.sleep(0.01)
        found.append(_is_accelerate(process.pid))
        process.kill()
        process.wait()
    assert found == [True, False]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {}),
        (OPEN_MPI | LOCAL, JOINED),
        ({"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, JOINED),
        ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "0"}, {"WORLD_SIZE": "4", "RANK": "0"}),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {}),
        ({**OPEN_MPI, **LOCAL, "WORLD_SIZE": "1"}, {}),
        ({**OPEN_MPI, **LOCAL, "WORLD_SIZE": "2", "RANK": "1"}, {}),  # torchrun within mpirun
        ({"PMI_SIZE": "two"}, {}),
    ],
)
def test_processes_of_mpi_are_told_as_torch_s(given: dict[str, str], added: dict[str, str]) -> None:
    environment = dict(given)
    read_launcher(environment)
    assert environment == {**given, **added}


def test_on_one_machine_they_meet_there() -> None:
    environment = {**OPEN_MPI, **LOCAL, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_PORT": "1234"}
    read_launcher(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "1234")


# Two machines of two tasks each, with the other job of the same user on one of them.
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
SLURM |= {"SLURM_LOCALID": "1", "SLURM_GTIDS": "2,3", "SLURM_STEP_NODELIST": "gpu[09-11,20]-ib,cpu1"}


def test_tasks_of_srun_are_told_as_torch_s_and_meet_on_the_first_machine() -> None:
    environment = dict(SLURM)
    read_launcher(environment, slurm=True)
    added = {name: value for name, value in environment.items() if name not in SLURM}
    port = added.pop("MASTER_PORT")
    assert added == {**JOINED, "MASTER_ADDR": "gpu09-ib"} and 20000 <= int(port) < 30000
    other = {**SLURM, "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "one,two"}
    read_launcher(other, slurm=True)
    assert other["MASTER_ADDR"] == "one" and other["MASTER_PORT"] != port
    alone = {**SLURM, "SLURM_GTIDS": "0,1,2,3", "SLURM_STEP_NODELIST": ""}
    read_launcher(alone, slurm=True)
    assert (alone["MASTER_ADDR"], alone["MASTER_PORT"], alone["LOCAL_WORLD_SIZE"]) == ("127.0.0.1", port, "4")
    with_pmi = {**SLURM, "PMI_SIZE": "4", "PMI_RANK": "3"}  # as `srun --mpi=pmi2` sets them
    read_launcher(with_pmi, slurm=True)
    assert with_pmi == {**environment, "PMI_SIZE": "4", "PMI_RANK": "3"}


@pytest.mark.parametrize(
    ("changed", "added"),
    [
        ({"SLURM_STEP_ID": "", "SLURM_NTASKS": "4"}, {}),  # the script of a batch job, which is one process
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}),
        ({"WORLD_SIZE": "8"}, {}),  # torchrun within srun
        ({"SLURM_PTY_PORT": "40211"}, {}),  # a command within `srun --pty bash`
        ({"RAY_ADDRESS": "gpu09:6379"}, {}),  # `srun ray symmetric-run ... -- localctl cache`
        ({"SLURM_PROCID": "1", **OPEN_MPI, **LOCAL}, JOINED),  # mpirun, which starts its own servers by srun
    ],
)
def test_only_tasks_of_srun_themselves_are_joined(changed: dict[str, str], added: dict[str, str]) -> None:
    given = {**SLURM, **changed}
    environment = dict(given)
    read_launcher(environment, slurm=True)
    assert environment == {**given, **added}


@pytest.mark.parametrize(
    ("more", "added"),
    [
        ({}, {}),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, {}),  # of `srun --mpi=pmi2`
        ({"SLURM_PROCID": "1", **OPEN_MPI, **LOCAL}, JOINED),
        ({"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, JOINED),  # of mpirun
    ],
)
def test_tasks_of_srun_stay_runs_of_their_own_but_for_a_training(more: dict[str, str], added: dict[str, str]) -> None:
    given = {**SLURM, **more}
    environment = dict(given)
    read_launcher(environment)
    assert environment == {**given, **added}


def test_only_training_joins_tasks_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def note(slurm: bool = False) -> None:
        asked.append(slurm)
        raise KeyError

    for module in (api, train, program):
        monkeypatch.setattr(module, "read_launcher", note)
    calls = (
        lambda: api.train(api.train_settings()),
        lambda: train.main([]),
        lambda: api.cache(api.cache_settings()),
        lambda: evaluate_fid.main(["gen"]),
        lambda: sample.main([]),
    )
    for call in calls:
        with pytest.raises(KeyError):
            call()
    assert asked == [True, True, False, False, False]


def test_an_error_that_several_processes_have_is_told_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tells("the same") and tells("the same")  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    lost = LostProcess("gone"), LostProcess("gone, said otherwise")
    for error in (*lost, ValueError("the same"), ValueError("the same"), ValueError("of this one"), *lost):
        fail("train", error)
    assert capsys.readouterr().err == "train: gone\ntrain: the same\ntrain: of this one\n"


def test_what_follows_from_a_told_error_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    assert tells("the disk is full") and not tells("stopped by SIGTERM", follows=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert tells("the disk is full") and tells("the disk is full")  # rather twice than not at all


def test_a_second_program_of_the_same_launcher_tells_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that torchrun starts may run several; the folder of Open MPI lasts for all that it starts."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("PMIX_SERVER_TMPDIR", str(tmp_path))
    assert tells("the disk is full") and tells("the disk is full")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    for follows in (False, True, False):
        assert tells("the disk is full", follows) and not tells("the disk is full", follows)
        for mark in tmp_path.iterdir():
            os.utime(mark, (0, 0))  # as if this process had started later


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process began")
def test_the_time_is_that_of_the_process_not_of_an_import() -> None:
    before = time.time()
    code = "import time; time.sleep(0.3); from localctl.launchers import _began; print(_began())"
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert before - 0.05 < began < before + 0.3


def test_without_a_time_from_the_system_an_error_is_still_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    monkeypatch.setattr(Path, "read_text", refuse)
    assert tells("the disk is full") and not tells("the disk is full")
