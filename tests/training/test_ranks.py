"""Several processes: one synchronisation of the gradients per update, and no waiting for a process that is gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from ddp_worker import settings_for, small_pictures
from process_helpers import finish, start_ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training_helpers import silent_run

from localctl.distributed import LostProcess, leave
from localctl.training import data, loop
from localctl.training.checkpoints import list_checkpoints

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
