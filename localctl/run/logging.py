"""Where a run's numbers go: ``stats.jsonl`` (one row of JSON per line) and, if wanted, TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from localctl.settings import REPORT_TO as REPORT_TO

STATS = "stats.jsonl"
BOARD, WANDB = "logs", "wandb"  # folders


class Tracker:
    """The null tracker: takes everything and keeps nothing (for all processes but the first)."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record numbers, lists of numbers (None = undefined) or text under their names, at ``step``."""

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """Record a picture."""

    def close(self) -> None:
        """Bring everything to the disk."""


class FileTracker(Tracker):
    """Writes ``folder/stats.jsonl``.

    ``start``: the step the run continues from. What an earlier, interrupted stretch logged beyond it is cut away, so
    that the log of a continued run is that of an uninterrupted one.
    """

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / STATS
        cut_back(path, start)
        self._file = path.open("a")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **_jsonable(values)}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # or a checkpoint could outlive the rows before it

    def close(self) -> None:
        self._file.close()


class BoardTracker(Tracker):
    """Writes TensorBoard files to ``folder/logs``; readers pass over what lies beyond ``start`` from before.

    ``settings``: flat, shown among the hyperparameters.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by everyone
        from torch.utils.tensorboard.summary import hparams

        self._board = SummaryWriter(str(folder / BOARD), purge_step=start + 1)
        shown = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in settings.items()
        }
        for summary in hparams(shown, {}):  # into the run itself; the writer's own method would make a second run
            self._board.file_writer.add_summary(summary)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, number in _scalars(values):
            self._board.add_scalar(name, number, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class WandbTracker(Tracker):
    """Logs to Weights & Biases, project ``localctl`` unless WANDB_PROJECT says otherwise.

    A continued run goes on under the same id, drawn over its own ``step``. What was sent cannot be taken back: steps
    that are run again show twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb  # an optional dependency

        path = folder / WANDB / "run_id"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        project = os.environ.get("WANDB_PROJECT", "localctl")
        self._picture = wandb.Image
        self._run = wandb.init(
            project=project, id=path.read_text(), resume="allow", dir=str(folder), config=dict(settings)
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(_scalars(values))})

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self._run.log({"step": step, name: self._picture(picture)})

    def close(self) -> None:
        self._run.finish()


class Trackers(Tracker):
    """Several as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        for tracker in self._trackers:
            tracker.image(step, name, picture)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def make_tracker(report_to: str, folder: Path, settings: Mapping[str, Any], *, start: int = 0) -> Tracker:
    """``stats.jsonl`` always, and what ``report_to`` names; ``all`` is TensorBoard, and wandb where it is installed.

    ``settings``: flat, without secrets. ``start``: the step the run continues from.
    """
    trackers: list[Tracker] = [FileTracker(folder, start=start)]
    if report_to in ("tensorboard", "all"):
        trackers.append(BoardTracker(folder, settings, start=start))
    if report_to == "wandb" or (report_to == "all" and _has_wandb()):
        trackers.append(WandbTracker(folder, settings))
    return Trackers(trackers)


def check_report_to(report_to: str) -> None:
    """ValueError when a tracker was asked for that is not installed."""
    if report_to == "wandb" and not _has_wandb():
        raise ValueError("report_to=wandb needs the package wandb; `pip install wandb`, or report_to=tensorboard.")


def _has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of ``path`` after ``step``, and a last line that was never finished."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().split("\n") if (row := _row(line)) and row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``folder/stats.jsonl``."""
    return [row for line in (folder / STATS).read_text().split("\n") if (row := _row(line))]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
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
