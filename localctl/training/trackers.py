"""Where a run's numbers go: ``stats.jsonl`` (one row of JSON per line) and, if wanted, TensorBoard and wandb."""

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
from localctl.settings import REPORT_TO as REPORT_TO

logger = logging.getLogger(__name__)
STATS = "stats.jsonl"
BOARD, WANDB = "logs", "wandb"  # folders


class Tracker:
    """The null tracker: takes everything and keeps nothing (for all processes but the first)."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record numbers, lists of numbers (None = undefined) or text under their names, at ``step``."""

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Record an image."""

    def close(self) -> None:
        """Bring everything to the disk."""


class FileTracker(Tracker):
    """Writes ``folder/stats.jsonl``.

    ``start``: the step the run continues from. What an earlier, interrupted stretch logged beyond it is cut away, so
    that the log of a continued run is that of an uninterrupted one.
    """

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / STATS
        cut_back(self._path, start)
        self._file = open_to_append(self._path)
        self._waiting = b""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """OSError where the disk takes no more; the row then comes with the next one."""
        self._find_again()
        self._waiting += (json.dumps({"step": step, **_jsonable(values)}) + "\n").encode()
        append(self._file, self._waiting, self._path)  # to the disk, or a checkpoint could outlive the rows before it
        self._waiting = b""

    def _find_again(self) -> None:
        """Begin a new file where somebody has removed the one that is written to."""
        if self._path.exists() and os.path.samestat(os.fstat(self._file), os.stat(self._path)):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = open_to_append(self._path)
        os.close(self._file)
        self._file = new

    def close(self) -> None:
        try:
            if self._waiting:
                append(self._file, self._waiting, self._path)
        finally:
            os.close(self._file)


class BoardTracker(Tracker):
    """Writes TensorBoard files to ``folder/logs``; readers pass over what lies beyond ``start`` from before.

    ``settings``: flat, shown among the hyperparameters.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, start: int = 0) -> None:
        self._give_back = _quiet_threads("tensorboard")
        try:
            self._board = _writer(folder / BOARD, settings, start)
        except BaseException:
            self._give_back()
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
            self._give_back()


def _writer(folder: Path, settings: Mapping[str, Any], start: int) -> Any:
    """TensorBoard's, with the hyperparameters written."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by everyone
    from torch.utils.tensorboard.summary import hparams

    board = SummaryWriter(str(folder), purge_step=start + 1)
    shown = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in settings.items()}
    for summary in hparams(shown, {}):  # into the run itself; the writer's own method would make a second run
        board.file_writer.add_summary(summary)
    return board


def _quiet_threads(package: str) -> Callable[[], None]:
    """Print no more what threads of ``package`` raise, as it is raised again where it is asked for
    more; returns what ends that."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith(package):
            before(args)

    def give_back() -> None:
        if threading.excepthook is hook:
            threading.excepthook = before

    threading.excepthook = hook
    return give_back


class WandbTracker(Tracker):
    """Logs to Weights & Biases, project ``localctl`` unless ``options`` or WANDB_PROJECT say otherwise.

    ``options``: of ``wandb.init``, such as project, name, group, tags and notes; None = as wandb's variables say.
    A continued run goes on under the same id, plotted over its own ``step``. What was sent cannot be taken back: steps
    that are run again show twice.
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
    """Several as one, by name. What one of them raises costs neither the training nor the others: it is said once for
    each tracker."""

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
            except Exception as error:  # anybody's library
                if name not in self._failed:
                    self._failed.add(name)
                    logger.warning(f"{name} takes nothing at {when} ({first_line(error)}); the training goes on.")


def make_tracker(
    report_to: str,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    start: int = 0,
    wandb: Mapping[str, Any] = MappingProxyType({}),
) -> Tracker:
    """``stats.jsonl`` always, and what ``report_to`` names; ``all`` is TensorBoard, and wandb where it is installed.

    ``settings``: flat, without secrets. ``start``: the step the run continues from. ``wandb``: project, name and the
    like, as for :class:`WandbTracker`. A tracker that cannot begin is said and left out. OSError where ``stats.jsonl``
    cannot be written.
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
        except Exception as error:  # anybody's library
            logger.warning(f"{name} cannot begin ({first_line(error)}); the training goes on without it.")
    return Trackers(trackers)


def check_report_to(report_to: str, wandb: Mapping[str, Any] = MappingProxyType({})) -> None:
    """ValueError when a tracker was asked for that is not installed, or ``wandb`` names a run that goes elsewhere."""
    named = [f"wandb.{name}" for name, value in wandb.items() if value is not None]
    if named and not (report_to == "wandb" or (report_to == "all" and _has_wandb())):
        raise ValueError(
            f"{' and '.join(named)} given, but report_to={report_to} sends nothing to wandb; set report_to=wandb."
        )
    if report_to == "wandb" and not _has_wandb():
        raise ValueError("report_to=wandb needs the package wandb; `pip install wandb`, or report_to=tensorboard.")


def _has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of ``path`` after ``step``, and a last line that was never finished."""
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
    except ValueError:  # cut off by a crash
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _jsonable(value: Any) -> Any:
    """NaN and infinity are no JSON: null."""
    if isinstance(value, Mapping):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(tag, number) for TensorBoard; the items of a list get numbered tags."""
    pairs: list[tuple[str, float]] = []
    for name, value in values.items():
        items = [(f"{name}/{i}", item) for i, item in enumerate(value)] if isinstance(value, list) else [(name, value)]
        pairs += [(tag, item) for tag, item in items if isinstance(item, (int, float)) and math.isfinite(item)]
    return pairs
