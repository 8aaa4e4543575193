"""The output folder of a run: check that it may be used, prepare it, and hold its lock."""

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
from localctl.training.trackers import BOARD, STATS, WANDB

_REPLACED = ".replaced"  # folder into which an earlier run is moved while it is removed
_OUTPUTS = (STATS, QUARANTINE, BOARD, WANDB, "validation", ADAPTER, T2IADAPTER, BEST, CARD, CONFIG)


def check_unused(folder: Path, overwrite: bool, resume: str | None = None) -> None:
    """Raise ValueError if ``folder`` holds an earlier run that would be mixed up or lost, or foreign files of the same
    names, which ``overwrite`` does not remove either.

    With ``resume`` = ``latest``, a run that was stopped before its first checkpoint may be replaced.
    """
    if not holds_run(folder):
        foreign = [name for name in _OUTPUTS if os.path.lexists(folder / name)]
        if foreign:
            raise ValueError(
                f"{folder} holds {foreign[0]}, which is not from a training run; choose another --output_dir."
            )
    elif not overwrite and not (resume == LATEST and _has_no_result(folder)):
        way_on = "continue it with --resume_from_checkpoint latest, " if list_checkpoints(folder) else ""
        raise ValueError(
            f"{folder} holds an earlier run{'' if way_on else ' without a checkpoint'}; {way_on}choose another "
            "--output_dir, or pass --overwrite_output_dir to replace it."
        )


def holds_run(folder: Path) -> bool:
    """Return whether a training run has written to ``folder``."""
    return bool(list_checkpoints(folder)) or (folder / STATS).exists()


def _has_no_result(folder: Path) -> bool:
    """Return whether the run in ``folder`` left neither a checkpoint nor an adapter."""
    return not list_checkpoints(folder) and not (folder / ADAPTER).exists()


def prepare_folder(folder: Path, step: int, resumed: bool) -> None:
    """Rename checkpoints after ``step`` if the run is resumed; else remove an earlier run (see ``check_unused``).

    OSError naming a file that cannot be removed; then none is.
    """
    sweep_folders(folder, (ADAPTER, BEST, T2IADAPTER))
    remove(folder / _REPLACED)
    if resumed:
        set_aside_later(folder, step)
    if resumed or not holds_run(folder):
        return
    # The log is removed last: as long as it exists, this is known to be the folder of a run.
    outputs = [path for name in reversed(_OUTPUTS) if os.path.lexists(path := folder / name)]
    _remove_all(folder / _REPLACED, [*list_checkpoints(folder).values(), *outputs])


def _remove_all(aside: Path, paths: list[Path]) -> None:
    """Remove all of ``paths`` or none: move them to ``aside`` first. Links are removed, their targets are not."""
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
        raise OSError(f"{path} cannot be removed ({error.strerror}); nothing was removed.") from error
    remove(aside)


class RunFolder:
    """The output folder of a run, which the first process locks. trouble: what happened to the folder, as a sentence;
    empty if nothing did.

    Raises:
        FolderInUse: another run writes to the folder.
        OSError: the folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.trouble = path, ""
        self.lock = on_first(lambda: FolderLock(path))
        self._first = None if self.lock is None else os.stat(path)

    def release(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.release()

    def find_checkpoint(self, request: str | None, overwrite: bool) -> Path | None:
        """Return the verified checkpoint to continue from; None for a fresh start, which needs an unused folder."""
        on_first(lambda: sweep(self.path))
        found = find_checkpoint(self.path, request)
        if found is None or not lies_in(found, self.path):
            check_unused(self.path, overwrite, request)
        return found

    def make_ready(self, step: int, resumed: bool) -> None:
        """Prepare the folder for a run that continues from ``step``, or for a fresh one."""
        on_first(lambda: prepare_folder(self.path, step, resumed))

    def check(self) -> bool:
        """Return whether the run must save and end because the folder was removed; the folder is created again.

        OSError if another run has taken the folder over: this one must not write any more.
        """
        lock = self.lock
        if lock is None:
            return False
        mine = lock.mine  # read once, as this runs after each step
        if not mine and (taken := lock.taken):
            raise OSError(f"{self.path} was taken over by {taken}; this run ends without writing there again.")
        if not self._is_there() and not self.trouble:
            self.trouble = (
                f"The output folder {self.path} was removed while training; it was created again and the training "
                "saved there: continue with --resume_from_checkpoint latest."
            )
        if not mine:
            lock.renew()
        return bool(self.trouble)

    def _is_there(self) -> bool:
        """Return whether the folder is still the original one; a later write may have created a new one of its name."""
        try:
            return self._first is not None and os.path.samestat(self._first, os.stat(self.path))
        except OSError:
            return False
