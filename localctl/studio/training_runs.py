"""Training runs as the studio shows them: the folders of a server, their curves, sheets and adapters; and the one
training that a server runs at a time, as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import localctl
from localctl.adapter_files import CONFIG
from localctl.labels import one_line
from localctl.training.checkpoints import list_checkpoints
from localctl.training.export import ADAPTER, BEST
from localctl.training.folder import holds_run
from localctl.training.trackers import STATS, read_stats

CURVES = {  # in this order: name on the page -> key in the log
    "loss": "loss",
    "denoising loss": "denoising",
    "local loss": "local_raw",
    "learning rate": "learning_rate",
    "gradient norm": "grad_norm",
    "validation F1": "validation/f1",
    "score": "score",
}
_DEPTH = 3  # of folders below the runs folder
_MOST_RUNS = 200
_TAIL = 4096  # bytes of the log of a running training
_STOPPED_BY = {0: "finished", 130: "stopped, with a checkpoint", 143: "stopped, with a checkpoint"}


def list_runs(root: Path) -> dict[str, Path]:
    """Return the training runs in ``root`` and below by their relative path, newest first."""
    found = sorted(_runs_below(root, _DEPTH), key=_age)[:_MOST_RUNS]
    return {path.relative_to(root).as_posix() if path != root else root.name: path for path in found}


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        if holds_run(folder):
            yield folder
            return
        inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")] if depth else []
    except OSError:  # not readable, or gone: not a run to show
        return
    for path in inner:
        yield from _runs_below(path, depth - 1)


def _age(folder: Path) -> float:
    try:
        return -(folder / STATS).stat().st_mtime
    except OSError:
        return 0.0


def find_run(root: Path, name: str) -> Path:
    """Return the folder of a run that :func:`list_runs` names. ValueError for any other name."""
    runs = list_runs(root)
    if name not in runs:
        raise ValueError(f"There is no run {one_line(str(name))!r}; choose one of the list.")
    return runs[name]


def curve_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of each of ``CURVES`` that the run's log has."""
    rows = read_stats(folder) if (folder / STATS).is_file() else []
    points = {
        name: [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
        for name, key in CURVES.items()
    }
    return {name: values for name, values in points.items() if values}


def sheet_files(folder: Path) -> dict[int, Path]:
    """Return the validation sheets of a run by step."""
    found = {}
    for path in folder.glob("validation/step-*.png"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def run_adapters(folder: Path) -> dict[str, Path]:
    """Return the adapters of a run by name: the finished one, the best one, those of its checkpoints, newest first."""
    places = {"finished": folder / ADAPTER, "best": folder / BEST}
    for step, path in reversed(list_checkpoints(folder).items()):
        places[f"step {step}"] = path / ADAPTER
    return {name: path for name, path in places.items() if (path / CONFIG).is_file()}


def adapter_label(run: str, adapter: str) -> str:
    """Return how other tabs call an adapter of a run."""
    return f"{run}: {adapter}"


def adapters_of_runs(root: Path) -> dict[str, Path]:
    """Return the adapters of all runs by :func:`adapter_label`, newest runs first."""
    return {
        adapter_label(run, name): place
        for run, folder in list_runs(root).items()
        for name, place in run_adapters(folder).items()
    }


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    run: its name. of: 0 before the first step. doing: what it does, as a clause. running: whether its process lives.
    """

    run: str
    step: int
    of: int
    doing: str
    running: bool


class Trainer:
    """Trains with ``experiment=quick``, one run at a time, into folders ``quick-N`` of the runs folder.

    The process belongs to the server, not to a page: it goes on when the page is closed, and :meth:`close` stops it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._run = ""
        self._starting = threading.Lock()

    @property
    def running(self) -> bool:
        """Whether a training runs now."""
        return self._process is not None and self._process.poll() is None

    def start(self, *overrides: str) -> str:
        """Start a run and return its name. ValueError while another one runs, or when the folder cannot be written.

        overrides: further ``key=value`` settings, never from a page.
        """
        with self._starting:
            return self._start(overrides)

    def _start(self, overrides: Sequence[str]) -> str:
        if self.running:
            raise ValueError(f"The run {self._run} is still training; stop it first.")
        numbers = [int(match[1]) for path in self.root.glob("quick-*") if (match := re.search(r"-(\d+)$", path.name))]
        self._run = f"quick-{max(numbers, default=0) + 1}"
        if self._log is not None:
            self._log.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        command = [sys.executable, "-m", "localctl", "train", "experiment=quick", f"output_dir={self.root / self._run}"]
        path = [str(Path(localctl.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}  # the bar is read
        self._process = subprocess.Popen(
            [*command, *overrides],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**kept, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # Ctrl-C in the server's terminal reaches it once, through close()
        )
        return self._run

    def stop(self) -> None:
        """Ask the training to save a checkpoint and end. ValueError when none runs."""
        if not self.running:
            raise ValueError("No training is running.")
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    def progress(self) -> Progress | None:
        """Return how far the training is, or how it ended; None before the first one."""
        if self._process is None:
            return None
        code = self._process.poll()
        text = self._tail()
        bars = re.findall(r"training:[^\n]*?(\d+)/(\d+) \[([^\]]*)\]?", text)
        step, of, rest = (int(bars[-1][0]), int(bars[-1][1]), bars[-1][2]) if bars else (0, 0, "")
        if code is None:
            doing = "validating" if "validating" in rest else "training" if of else "loading"
        else:
            last = one_line(text.strip().splitlines()[-1]) if text.strip() else ""
            doing = _STOPPED_BY.get(code, f"ended with an error: {last}")
        return Progress(self._run, step, of, doing, code is None)

    def _tail(self) -> str:
        assert self._log is not None
        size = os.fstat(self._log.fileno()).st_size
        content = os.pread(self._log.fileno(), _TAIL, max(0, size - _TAIL))
        return content.decode("utf-8", "replace").replace("\r", "\n")

    def close(self, seconds: float = 30) -> None:
        """Stop the training, if one runs, and wait for its end."""
        process: subprocess.Popen[Any] | None = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
        self._process = None
