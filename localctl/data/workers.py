"""Data workers: processes that read batches ahead, and end when the loop over the batches ends for any reason."""

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

_JOIN_TIMEOUT = 5  # seconds to wait for the end of a killed worker


class WorkerError(OSError):
    """A data worker was killed."""


@contextmanager
def loading(dataset: Dataset, workers: int, **options: Any) -> Iterator[Iterator[Any]]:
    """Iterate over the batches of a ``DataLoader``; its ``workers`` processes end with the context.

    Args:
        options: further arguments of ``DataLoader``.

    Raises:
        WorkerError: from ``next``, if a worker was killed; never while the caller does something else, such as saving.
        OSError, ValueError: the error of a worker, without its traceback in the text.
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
    if main:  # torch's handler would raise at any point of the program
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield _read(batches, processes)
    finally:
        _kill(processes)
        if processes:
            batches._shutdown_workers()  # ends its queues and threads
        if main:
            signal.signal(signal.SIGCHLD, former or signal.SIG_DFL)


def start_worker(worker: int) -> None:
    """Set up a data worker: it ignores signals, which its parent handles, and OpenCV runs in a single thread."""
    ignore_signals(worker)
    cv2.setNumThreads(0)


def _kill(processes: Sequence[Any]) -> None:
    """Kill workers, which ignore milder signals; nothing is lost but batches that were read ahead."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_JOIN_TIMEOUT)


def _read(batches: Iterator[Any], processes: Sequence[Any]) -> Iterator[Any]:
    while True:
        _check(processes)
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError:  # torch raises this for a dead worker
            _check(processes)
            raise
        except (OSError, ValueError) as error:
            raise _one_sentence(error) from error
        yield batch


def _check(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.exitcode not in (None, 0):
            raise WorkerError(_worker_error(process.exitcode))


def _worker_error(code: int) -> str:
    """Return the sentence for a worker that ended with exit code ``code``."""
    if code == -signal.SIGBUS:
        return "A data worker was killed (SIGBUS; is the shared memory in /dev/shm full?); use fewer data workers."
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = "; out of memory?" if code == -signal.SIGKILL else ""
    return f"A data worker was killed ({how}{reason}); use fewer data workers if it happens again."


def _one_sentence(error: OSError | ValueError) -> OSError | ValueError:
    """Reduce a worker's error, whose text holds its traceback, to the last line, which is the message itself."""
    text = str(error)
    if not text.startswith("Caught "):
        return error
    last = text.strip().splitlines()[-1]
    return type(error)(last.partition(": ")[2] or last)
