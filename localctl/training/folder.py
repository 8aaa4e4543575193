"""The output folder of a run: whether it may be used, and making it ready."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from localctl.data.bad import QUARANTINE
from localctl.run.checkpoints import LATEST, list_checkpoints, set_aside_later, sweep
from localctl.run.logging import BOARD, STATS, WANDB
from localctl.training.export import ADAPTER, BEST, CARD, CONFIG, T2IADAPTER

_OUTPUTS = (STATS, QUARANTINE, BOARD, WANDB, "validation", ADAPTER, T2IADAPTER, BEST, CARD, CONFIG)


def check_writable(folder: Path) -> None:
    """ValueError when ``folder`` is not there and cannot be made, or cannot be written to."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"Nothing can be written to {folder}, because of {nearest}; choose another --output_dir.")


def check_unused(folder: Path, overwrite: bool, resume: str | None = None) -> None:
    """ValueError when ``folder`` holds an earlier run that would be mixed up or lost, or files of somebody else's by
    the names of ours, which not even ``overwrite`` may touch.

    With ``resume`` = ``latest``, a run that was stopped before its first checkpoint is no obstacle.
    """
    if not holds_run(folder):
        foreign = [name for name in _OUTPUTS if (folder / name).exists()]
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]}, but not of a training run; choose another --output_dir.")
    elif not overwrite and not (resume == LATEST and _never_got_far(folder)):
        way_on = "continue it with --resume_from_checkpoint latest, " if list_checkpoints(folder) else ""
        raise ValueError(
            f"{folder} holds an earlier run{'' if way_on else ' without a checkpoint'}; {way_on}choose another "
            "--output_dir, or pass --overwrite_output_dir to replace it."
        )


def holds_run(folder: Path) -> bool:
    """Whether a training run has written to ``folder``."""
    return bool(list_checkpoints(folder)) or (folder / STATS).exists()


def _never_got_far(folder: Path) -> bool:
    """Whether the run in ``folder`` left neither a checkpoint nor an adapter."""
    return not list_checkpoints(folder) and not (folder / ADAPTER).exists()


def prepare_folder(folder: Path, step: int, resumed: bool, say: Callable[[str], None]) -> None:
    """Resumed: set aside checkpoints beyond ``step``. Fresh: remove an earlier run, which ``check_unused`` let pass."""
    sweep(folder)
    if resumed:
        set_aside_later(folder, step, say)
    if resumed or not holds_run(folder):
        return
    # The log goes last: as long as it is there, this is known to be a run's folder.
    for path in [*list_checkpoints(folder).values(), *(folder / name for name in reversed(_OUTPUTS))]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
