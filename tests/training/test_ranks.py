"""Several processes: joined on CPUs too, with one voice; one synchronisation of the gradients per update; no waiting
for a process that is gone."""

from __future__ import annotations

import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from ddp_worker import settings_for, small_pictures
from process_helpers import finish, start_ranks, wait_for
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training_helpers import silent_run

from localctl.adapter_files import find_adapter
from localctl.cli import train
from localctl.cli.program import report_error
from localctl.distributed import LostProcess, leave, on_first
from localctl.launchers import read_launcher
from localctl.training import data, loop, state
from localctl.training.checkpoints import check_writable, list_checkpoints
from localctl.training.state import new_accelerator
from localctl.training.trackers import read_stats

UPDATES, ACCUMULATION = 3, 4


def count_synchronisations(base: Path, folder: Path) -> int:
    """Return the number of times that the gradients' first bucket was summed over the processes."""
    data.make_source = small_pictures
    options = {"max_train_steps": UPDATES, "gradient_accumulation_steps": ACCUMULATION}
    run = silent_run(settings_for(base, folder, "none", 2, **options))
    sums = []

    def counted(state, bucket):
        sums.append(bucket.index())
        return allreduce_hook(state, bucket)

    run.state.models.adapter.register_comm_hook(None, counted)
    run.train()
    leave()
    return sums.count(0)


def test_gradients_are_synchronised_once_per_update(sd_folder, tmp_path):
    ranks = start_ranks(2, count_synchronisations, sd_folder, tmp_path)
    assert [finish(process) for process in ranks] == [UPDATES, UPDATES]


def train_by_command(folder: Path) -> int:
    """Run train_adapter.py as torchrun would; what it says goes to a file per process."""
    arguments = ["experiment=quick", "train_batch_size=2", "max_train_steps=2", "validation_steps=0", "logging_steps=1"]
    said = folder / f"said-{os.environ['RANK']}"
    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        return train.main([*arguments, f"output_dir={folder / 'run'}"])


def test_processes_that_torchrun_starts_without_a_gpu_train_together_and_the_first_speaks(tmp_path):
    assert [finish(process) for process in start_ranks(2, train_by_command, tmp_path)] == [0, 0]
    first, second = ((tmp_path / f"said-{rank}").read_text() for rank in (0, 1))
    assert "steps       to 2, 4 samples each, on cpu" in first and "2/2" in first and "Done: " in first
    assert second == ""
    assert find_adapter(str(tmp_path / "run")) is not None
    assert [row["step"] for row in read_stats(tmp_path / "run")] == [1, 2]


def refused_by_the_first(base: Path, folder: Path) -> int:
    """Find on one process what all are then told, and print it as the programs do."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / os.environ["RANK"] / "error.json")
    new_accelerator(settings_for(base, folder, "none", 2))
    with (folder / f"said-{os.environ['RANK']}").open("w") as file, redirect_stderr(file):
        try:
            on_first(lambda: check_writable(base / "model_index.json"))
        except ValueError as error:
            return report_error("train_adapter.py", error)
    return 0


def test_an_error_of_all_processes_is_told_by_one(sd_folder, tmp_path):
    assert [finish(process) for process in start_ranks(2, refused_by_the_first, sd_folder, tmp_path)] == [2, 2]
    told = "".join((tmp_path / f"said-{rank}").read_text() for rank in (0, 1))
    assert told.count("train_adapter.py: Nothing can be written to") == 1


def alone(base: Path, folder: Path) -> int:
    """Make the accelerator as one of two processes, the other of which is missing."""
    with (folder / "said").open("w", buffering=1) as file, redirect_stderr(file):
        new_accelerator(settings_for(base, folder, "none", 1))
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_a_missing_one_ends_at_a_signal(number, sd_folder, tmp_path):
    [waiting] = start_ranks(2, alone, sd_folder, tmp_path, only=0)
    wait_for(
        lambda: (tmp_path / "said").exists() and "waiting for the other" in (tmp_path / "said").read_text(), waiting
    )
    time.sleep(0.3)  # until it waits in torch
    os.kill(waiting.pid, number)
    assert finish(waiting, 10) == -number


def joined_by_mpi(base: Path, folder: Path) -> int:
    """Make the accelerator as ``mpirun`` starts a process: without the variables of torchrun."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        value = os.environ.pop(name)
        names = {"WORLD_SIZE": "SIZE", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
        if name != "MASTER_ADDR":
            os.environ[f"OMPI_COMM_WORLD_{names.get(name, name)}"] = value
    read_launcher()
    made = new_accelerator(settings_for(base, folder, "none", 2))
    leave()
    return made.num_processes * 10 + made.process_index


def test_processes_that_mpirun_starts_train_together(sd_folder, tmp_path):
    assert [finish(process) for process in start_ranks(2, joined_by_mpi, sd_folder, tmp_path)] == [20, 21]


def of_its_own(base: Path, folder: Path, name: str) -> int:
    """Prepare a training with a setting of its own, as a script does that takes each task for a run."""
    data.make_source = small_pictures
    loop.new_state = None  # found before the base is loaded
    rank = os.environ["RANK"]
    try:
        if name == "output_dir":
            silent_run(settings_for(base, folder / rank, "none", 2))
        else:
            silent_run(settings_for(base, folder, "none", 2, **{name: 40 + int(rank)}))
    except ValueError as error:
        return 7 if "have different settings" in str(error) else 0
    return 0


@pytest.mark.parametrize("name", ["seed", "output_dir", "max_train_steps"])
def test_processes_with_different_settings_do_not_train_together(name, sd_folder, tmp_path):
    assert [finish(process) for process in start_ranks(2, of_its_own, sd_folder, tmp_path, name)] == [7, 7]


def unjoined(base: Path, folder: Path, with_rank: bool) -> int:
    """Make the accelerator without the variable by which accelerate knows a local rank, or as on a machine with a
    device of which accelerate knows nothing."""
    if with_rank:
        state._has_own_backend = lambda: True
    else:
        del os.environ["LOCAL_RANK"]
    try:
        new_accelerator(settings_for(base, folder, "none", 1))
    except ValueError as error:
        (folder / "said").write_text(str(error))
    return 0


@pytest.mark.parametrize("with_rank", [True, False])
def test_a_process_that_is_not_joined_to_the_others_does_not_train(with_rank, sd_folder, tmp_path):
    [process] = start_ranks(2, unjoined, sd_folder, tmp_path, with_rank)[:1]
    assert finish(process) == 0
    assert (tmp_path / "said").read_text().startswith("WORLD_SIZE=2 names 2 processes, but accelerate does not join")


def killed_in_a_step(base: Path, folder: Path) -> int:
    """Train; process 1 is killed in its third step. Return 1 if the loss of a process is reported."""
    data.make_source = small_pictures
    step, made = loop.training_step, []

    def killed(*arguments):
        made.append(1)
        if os.environ["RANK"] == "1" and len(made) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    loop.training_step = killed
    run = silent_run(settings_for(base, folder, "none", 2, max_train_steps=50, checkpointing_steps=2))
    try:
        run.train()
    except LostProcess as error:
        (folder / "said").write_text(str(error))
        os._exit(1)  # the process group cannot be left in order
    return 0


def test_a_killed_process_ends_the_other_with_a_sentence(sd_folder, tmp_path):
    ranks = start_ranks(2, killed_in_a_step, sd_folder, tmp_path)
    assert [finish(process, 60) for process in ranks] == [1, -signal.SIGKILL]
    said = (tmp_path / "said").read_text()
    assert said.startswith("Another process of this job has ended")
    assert said.endswith("continue from the last checkpoint with --resume_from_checkpoint latest.")
    assert list(list_checkpoints(tmp_path)) == [2]
