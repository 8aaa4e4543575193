"""Data workers: processes that read ahead. They end with the loop that reads from them, however it ends."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset

from localctl.signals import ignore_signals

_GONE = 5  # seconds that a killed worker may take to be gone


class WorkerError(OSError):
    """A data worker was killed."""


@contextmanager
def loading(dataset: Dataset, workers: int, **options: Any) -> Iterator[Iterator[Any]]:
    """Read the batches of a ``DataLoader`` by ``workers`` processes that are gone when the context is left.

    ``options`` are the loader's. A killed worker is a :class:`WorkerError` of whoever asks for the next batch, never
    of what is done in between, such as saving. An OSError or ValueError of a worker is raised again as one sentence.
    """
    loader = DataLoader(dataset, num_workers=workers, worker_init_fn=start_worker, **options)
    before, main = multiprocessing.active_children(), threading.current_thread() is threading.main_thread()
    former = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
    except BaseException:
        _kill([child for child in multiprocessing.active_children() if child not in before])
        raise
    processes: Sequence[Any] = getattr(batches, "_workers", ())
    if main:  # torch's handler would raise in the middle of anything
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield _read(batches, processes)
    finally:
        _kill(processes)
        if processes:
            batches._shutdown_workers()  # its queues and threads
        if main:
            signal.signal(signal.SIGCHLD, former or signal.SIG_DFL)


def start_worker(worker: int) -> None:
    """Begin a data worker: it leaves signals to its parent, and has none of the threads that OpenCV had started
    there."""
    ignore_signals(worker)
    cv2.setNumThreads(0)


def _kill(processes: Sequence[Any]) -> None:
    """End workers that may be busy and ignore everything milder; what they hold is only what was read ahead."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_GONE)


def _read(batches: Iterator[Any], processes: Sequence[Any]) -> Iterator[Any]:
    while True:
        _check(processes)
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError:  # how torch tells of a worker that is gone
            _check(processes)
            raise
        except (OSError, ValueError) as error:
            raise _one_sentence(error) from error
        yield batch


def _check(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.exitcode not in (None, 0):
            raise WorkerError(_why(process.exitcode))


def _why(code: int) -> str:
    """Say what became of a worker that ended with ``code``."""
    if code == -signal.SIGBUS:
        return "A data worker was killed (SIGBUS: the shared memory in /dev/shm is full?); use fewer data workers."
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = "; out of memory?" if code == -signal.SIGKILL else ""
    return f"A data worker was killed ({how}{reason}); use fewer data workers if it happens again."


def _one_sentence(error: OSError | ValueError) -> OSError | ValueError:
    """Shorten an error of a worker, which comes with the traceback in its text, to its last line, the error itself."""
    text = str(error)
    if not text.startswith("Caught "):
        return error
    last = text.strip().splitlines()[-1]
    return type(error)(last.partition(": ")[2] or last)
