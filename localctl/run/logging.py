"""Where a run's numbers go: ``stats.jsonl`` (one row of JSON per line) and, if wanted, TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

STATS = "stats.jsonl"
REPORT_TO = ("tensorboard", "none")


class Tracker:
    """The null tracker: takes everything and keeps nothing (for all processes but the first)."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record numbers, lists of numbers (None = undefined) or text under their names, at ``step``."""

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """Record a picture."""

    def close(self) -> None:
        """Bring everything to the disk."""


class FileTracker(Tracker):
    """Writes ``folder/stats.jsonl`` always and TensorBoard files to ``folder/logs`` if ``tensorboard``.

    ``start``: the step the run continues from. What an earlier, interrupted stretch logged beyond it is cut away, so
    that the log of a continued run is that of an uninterrupted one.
    """

    def __init__(self, folder: Path, *, start: int = 0, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / STATS
        cut_back(path, start)
        self._file = path.open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by everyone

            self._board = SummaryWriter(str(folder / "logs"), purge_step=start + 1 if start else None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **_jsonable(values)}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, number in _scalars(values):
                self._board.add_scalar(name, number, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        if self._board is not None:
            self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of ``path`` after ``step``, and a last line that was never finished."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (row := _row(line)) and row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``folder/stats.jsonl``."""
    return [row for line in (folder / STATS).read_text().splitlines() if (row := _row(line))]


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
