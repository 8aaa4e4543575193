"""The output folder of a run: whether it may be used, making it ready, and keeping it locked."""

from __future__ import annotations

import os
from pathlib import Path

from localctl.data.bad_rows import QUARANTINE
from localctl.distributed import on_first
from localctl.files import remove
from localctl.lock import FolderLock
from localctl.training.checkpoints import (
    LATEST,
    find_checkpoint,
    lies_in,
    list_checkpoints,
    set_aside_later,
    sweep,
    sweep_folders,
)
from localctl.training.export import ADAPTER, BEST, CARD, CONFIG, T2IADAPTER
from localctl.training.settings import TrainSettings
from localctl.training.trackers import BOARD, STATS, WANDB

_REPLACED = ".replaced"  # folder in which an earlier run lies while it is removed
_OUTPUTS = (STATS, QUARANTINE, BOARD, WANDB, "validation", ADAPTER, T2IADAPTER, BEST, CARD, CONFIG)


def check_unused(folder: Path, overwrite: bool, resume: str | None = None) -> None:
    """ValueError when ``folder`` holds an earlier run that would be mixed up or lost, or files of somebody else's by
    the names of ours, which not even ``overwrite`` may touch.

    With ``resume`` = ``latest``, a run that was stopped before its first checkpoint is no obstacle.
    """
    if not holds_run(folder):
        foreign = [name for name in _OUTPUTS if os.path.lexists(folder / name)]
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


def prepare_folder(folder: Path, step: int, resumed: bool) -> None:
    """Resumed: set aside checkpoints beyond ``step``. Fresh: remove an earlier run, which ``check_unused`` let pass.

    OSError naming what cannot be removed; then nothing is.
    """
    sweep_folders(folder, (ADAPTER, BEST, T2IADAPTER))
    remove(folder / _REPLACED)
    if resumed:
        set_aside_later(folder, step)
    if resumed or not holds_run(folder):
        return
    # The log goes last: as long as it is there, this is known to be a run's folder.
    outputs = [path for name in reversed(_OUTPUTS) if os.path.lexists(path := folder / name)]
    _remove_all(folder / _REPLACED, [*list_checkpoints(folder).values(), *outputs])


def _remove_all(aside: Path, paths: list[Path]) -> None:
    """Remove ``paths``, links without what they lead to: first out of the way, all of them or none."""
    aside.mkdir()
    moved: list[Path] = []
    try:
        for path in paths:
            path.rename(aside / path.name)
            moved.append(path)
    except OSError as error:
        for done in reversed(moved):
            (aside / done.name).rename(done)
        aside.rmdir()
        raise OSError(f"{path} cannot be removed ({error.strerror}); nothing was.") from error
    remove(aside)


class RunFolder:
    """The output folder of a run, locked for it by the first process. trouble: what became of the folder meanwhile, as
    a sentence; empty as long as all is well.

    Raises:
        FolderInUse: another run writes there.
        OSError: the folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.trouble = path, ""
        self.lock = on_first(lambda: FolderLock(path))
        self._first = None if self.lock is None else os.stat(path)

    def release(self) -> None:
        """Let others write there."""
        if self.lock is not None:
            self.lock.release()

    def find_checkpoint(self, settings: TrainSettings) -> Path | None:
        """Find the checkpoint to go on from, verified; None for a fresh start, for which the folder must be free."""
        on_first(lambda: sweep(self.path))
        found = find_checkpoint(self.path, settings.resume_from_checkpoint)
        if found is None or not lies_in(found, self.path):
            check_unused(self.path, settings.overwrite_output_dir, settings.resume_from_checkpoint)
        return found

    def make_ready(self, step: int, resumed: bool) -> None:
        """Clear away what is in the way of a run that goes on from ``step``, or of a fresh one."""
        on_first(lambda: prepare_folder(self.path, step, resumed))

    def look(self) -> bool:
        """Whether the run must save and end, as somebody has removed the folder; it is made again.

        OSError where another run has taken it over: nothing may be written any more.
        """
        lock = self.lock
        if lock is None:
            return False
        mine = lock.mine  # asked once, as each step comes here
        if not mine and (taken := lock.taken):
            raise OSError(f"{self.path} was taken over by {taken}; this run ends without writing there again.")
        if not self._is_there() and not self.trouble:
            self.trouble = (
                f"The output folder {self.path} was removed while training; what could be saved is there again: go "
                "on with --resume_from_checkpoint latest."
            )
        if not mine:
            lock.renew()
        return bool(self.trouble)

    def _is_there(self) -> bool:
        """Whether the folder is the one of the beginning; a new one of its name may have been made by whoever wrote."""
        try:
            return self._first is not None and os.path.samestat(self._first, os.stat(self.path))
        except OSError:
            return False
