"""Trackers of a run's numbers: ``stats.jsonl`` (one JSON object per line) and, on request, TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from localctl.files import append, first_line, open_to_append, parse_json, write_bytes, write_text

logger = logging.getLogger(__name__)
STATS = "stats.jsonl"
BOARD, WANDB = "logs", "wandb"  # folders


class Tracker:
    """A tracker that records nothing, for all processes but the first; the base of the others."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record numbers, lists of numbers (None = undefined) or text under their names, at ``step``."""

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Record an image."""

    def close(self) -> None:
        """Flush everything to the disk."""


class FileTracker(Tracker):
    """Writes ``folder/stats.jsonl``.

    ``start``: the step from which the run continues. Later rows of an interrupted run are removed, so that the log of a
    resumed run equals that of an uninterrupted one.
    """

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / STATS
        truncate_log(self._path, start)
        self._file = open_to_append(self._path)
        self._unwritten = b""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a row. OSError if it cannot be written; it is then written with the next one."""
        self._reopen_if_removed()
        self._unwritten += (json.dumps({"step": step, **_jsonable(values)}) + "\n").encode()
        append(self._file, self._unwritten, self._path)  # flushed: no checkpoint may survive without its rows
        self._unwritten = b""

    def _reopen_if_removed(self) -> None:
        """Start a new file if the present one was removed."""
        if self._path.exists() and os.path.samestat(os.fstat(self._file), os.stat(self._path)):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = open_to_append(self._path)
        os.close(self._file)
        self._file = new

    def close(self) -> None:
        try:
            if self._unwritten:
                append(self._file, self._unwritten, self._path)
        finally:
            os.close(self._file)


class BoardTracker(Tracker):
    """Writes TensorBoard files to ``folder/logs``; TensorBoard ignores earlier entries after step ``start``.

    ``settings``: flat, shown as hyperparameters.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, start: int = 0) -> None:
        self._restore_hook = _quiet_threads("tensorboard")
        try:
            self._board = _writer(folder / BOARD, settings, start)
        except BaseException:
            self._restore_hook()
            raise

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, number in _scalars(values):
            self._board.add_scalar(name, number, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        try:
            self._board.close()
        finally:
            self._restore_hook()


def _writer(folder: Path, settings: Mapping[str, Any], start: int) -> Any:
    """Return TensorBoard's writer after writing the hyperparameters."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import
    from torch.utils.tensorboard.summary import hparams

    board = SummaryWriter(str(folder), purge_step=start + 1)
    shown = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in settings.items()}
    for summary in hparams(shown, {}):  # into this run; SummaryWriter.add_hparams would create a second one
        board.file_writer.add_summary(summary)
    return board


def _quiet_threads(package: str) -> Callable[[], None]:
    """Do not print exceptions in threads of ``package``, which its next call raises again; return a function that
    undoes this."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith(package):
            before(args)

    def restore() -> None:
        if threading.excepthook is hook:
            threading.excepthook = before

    threading.excepthook = hook
    return restore


class WandbTracker(Tracker):
    """Logs to Weights & Biases, project ``localctl`` unless ``options`` or WANDB_PROJECT say otherwise.

    ``options``: of ``wandb.init``, such as project, name, group, tags and notes; None = from wandb's variables.
    A resumed run keeps its id and is plotted over its own ``step``. Sent rows cannot be removed, so that steps that are
    repeated appear twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        import wandb  # an optional dependency

        path = folder / WANDB / "run_id"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:8])
        named = {"project": os.environ.get("WANDB_PROJECT", "localctl")}
        named |= {name: value for name, value in options.items() if value is not None}
        self._as_image = wandb.Image
        self._run = wandb.init(id=path.read_text(), resume="allow", dir=str(folder), config=dict(settings), **named)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(_scalars(values))})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({"step": step, name: self._as_image(image)})

    def close(self) -> None:
        self._run.finish()


class Trackers(Tracker):
    """Several trackers by name. An exception of one ends neither the training nor the others; the first of each tracker
    is logged."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._failed: set[str] = set()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log(step, values), f"step {step}")

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._each(lambda tracker: tracker.image(step, name, image), f"step {step}")

    def close(self) -> None:
        self._each(lambda tracker: tracker.close(), "the end")

    def _each(self, work: Callable[[Tracker], None], when: str) -> None:
        for name, tracker in self._trackers.items():
            try:
                work(tracker)
            except Exception as error:  # of any library
                if name not in self._failed:
                    self._failed.add(name)
                    logger.warning(f"{name} recorded nothing at {when} ({first_line(error)}); the training goes on.")


def make_tracker(
    report_to: str,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    start: int = 0,
    wandb: Mapping[str, Any] = MappingProxyType({}),
) -> Tracker:
    """Return a tracker for ``stats.jsonl`` and what ``report_to`` names; ``all``: TensorBoard, and wandb if installed.

    ``settings``: flat, without secrets. ``start``: the step from which the run continues. ``wandb``: options of
    :class:`WandbTracker`. A tracker that cannot start is logged and left out. OSError if ``stats.jsonl`` cannot be
    written.
    """
    trackers: dict[str, Tracker] = {STATS: FileTracker(folder, start=start)}
    wanted: dict[str, Callable[[], Tracker]] = {}
    if report_to in ("tensorboard", "all"):
        wanted["TensorBoard"] = lambda: BoardTracker(folder, settings, start=start)
    if report_to == "wandb" or (report_to == "all" and _has_wandb()):
        wanted["wandb"] = lambda: WandbTracker(folder, settings, wandb)
    for name, make in wanted.items():
        try:
            trackers[name] = make()
        except Exception as error:  # of any library
            logger.warning(f"{name} cannot start ({first_line(error)}); the training goes on without it.")
    return Trackers(trackers)


def check_report_to(report_to: str, wandb: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raise ValueError if a requested tracker is not installed, or ``wandb`` has options but nothing is sent there."""
    named = [f"wandb.{name}" for name, value in wandb.items() if value is not None]
    if named and not (report_to == "wandb" or (report_to == "all" and _has_wandb())):
        raise ValueError(
            f"{' and '.join(named)} given, but report_to={report_to} sends nothing to wandb; set report_to=wandb."
        )
    if report_to == "wandb" and not _has_wandb():
        raise ValueError("report_to=wandb needs the package wandb; `pip install wandb`, or report_to=tensorboard.")


def _has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None


def truncate_log(path: Path, step: int) -> None:
    """Remove the rows of ``path`` after ``step``, and an incomplete last line."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().split(b"\n") if (row := _row(line)) and row["step"] <= step]
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of ``folder/stats.jsonl``."""
    return [row for line in (folder / STATS).read_bytes().split(b"\n") if (row := _row(line))]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:  # incomplete after a crash
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _jsonable(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, Mapping):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (tag, number) pairs for TensorBoard; the items of a list get numbered tags."""
    pairs: list[tuple[str, float]] = []
    for name, value in values.items():
        items = [(f"{name}/{i}", item) for i, item in enumerate(value)] if isinstance(value, list) else [(name, value)]
        pairs += [(tag, item) for tag, item in items if isinstance(item, (int, float)) and math.isfinite(item)]
    return pairs
