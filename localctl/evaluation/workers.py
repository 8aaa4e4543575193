"""Spread work over workers: Ray actors on this machine or on a cluster, each with a GPU or a CPU of its own.

Workers run in the folder of this process and read and write the same files, so machines must share that disk. Results
come in the order of the work, so that whatever is summed up from them has the same bits as in one process.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from localctl.cluster import connected
from localctl.distributed import LostProcess, processes
from localctl.files import first_line

logger = logging.getLogger(__name__)
Piece = TypeVar("Piece")
Result = TypeVar("Result")
Work = Callable[[Piece], Result]
TRIES = 4  # of a piece that kills its worker
_AGAIN = " What is written is kept: the same command goes on from there."
_BLOCKS = 10_000  # Ray keeps a record of each


def spread(
    work: Work[Piece, Result],
    make: Callable[[], Work[Piece, Result]],
    pieces: Sequence[Piece],
    workers: int | None,
    device: str = "cpu",
) -> Iterator[Result]:
    """Do each piece of work in one of ``workers`` processes, and yield the results in the order of ``pieces``.

    A worker that dies is started again, and its piece is done again, ``TRIES`` times at most.

    Args:
        work: does a piece in this process, where ``workers`` is None.
        make: makes the function that does a piece in a worker, called once in each. It, the pieces and the results are
            pickled.
        device: of the settings; ``auto`` and ``cuda`` give each worker a GPU of the cluster, if it has some.

    Raises:
        ValueError: within torchrun, without Ray, without the cluster or the device, or as a piece raised it.
        OSError: as a piece raised it; a piece killed its worker ``TRIES`` times; the cluster failed.
    """
    if workers is None:
        yield from map(work, pieces)
        return
    if processes()[1] > 1:
        raise ValueError("num_workers starts processes itself; leave it out under torchrun, or run without torchrun.")
    with connected(workers) as ray:
        gpus = _gpus(ray, workers, device)
        tries = ray.remote(num_cpus=0)(_Tries).remote()
        rows = [{"number": number, "piece": pickle.dumps(piece)} for number, piece in enumerate(pieces)]
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).map_batches(
            _Worker,
            fn_constructor_args=(make, os.getcwd(), tries),
            batch_size=1,
            batch_format="numpy",
            concurrency=workers,
            num_cpus=1,
            num_gpus=gpus,
        )
        data.context.execution_options.preserve_order = True
        try:
            for row in data.iter_rows():
                result = pickle.loads(row["result"])
                if isinstance(result, _Failure):
                    raise result.error()
                yield result
        except ray.exceptions.RayTaskError:  # a bug, with its traceback
            raise
        except ray.exceptions.RayError as error:
            raise LostProcess(f"The Ray cluster has failed ({first_line(error)[:200]}).{_AGAIN}") from error


def _gpus(ray: Any, workers: int, device: str) -> int:
    """Return how many GPUs a worker gets, 0 or 1. ValueError where ``device`` needs one that the cluster lacks."""
    resources = ray.cluster_resources()
    found = int(resources.get("GPU", 0))
    if device.startswith("cuda") and not found:
        raise ValueError(f"No machine of the cluster has a GPU for the device {device!r}; try the device 'cpu'.")
    gpus = int(found > 0 and device.startswith(("auto", "cuda")))
    places, what = (found, "GPUs") if gpus else (int(resources.get("CPU", 0)), "CPUs")
    if workers > places:
        logger.warning(f"The cluster has {places} {what} for {workers} workers: some of them wait.")
    return gpus


@dataclass(frozen=True)
class _Failure:
    """A user's error or a failed file, as it came out of a worker."""

    is_value_error: bool
    message: str

    def error(self) -> ValueError | OSError:
        return (ValueError if self.is_value_error else OSError)(self.message)


class _Tries:
    """Counts, in a process of its own, how often each piece was begun."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self.counts[number] += 1
        return self.counts[number]

    def done(self, number: int) -> None:
        del self.counts[number]


class _Worker:
    """Does pieces of work in a process of its own."""

    def __init__(self, make: Callable[[], Work[Any, Any]], folder: str, tries: Any) -> None:
        self.make, self.folder, self.tries = make, folder, tries
        self.work: Work[Any, Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        number, piece = int(batch["number"][0]), pickle.loads(batch["piece"][0])
        try:
            if import_module("ray").get(self.tries.begin.remote(number)) > TRIES:
                raise OSError(
                    f"{_named(piece)} killed its worker {TRIES} times; on a machine with too little memory, lower "
                    f"batch_size or num_workers.{_AGAIN}"
                )
            result = self._ready()(piece)
            self.tries.done.remote(number)
        except (ValueError, OSError) as error:
            result = _Failure(isinstance(error, ValueError), str(error))
        return {"result": np.array([pickle.dumps(result)], dtype=object)}

    def _ready(self) -> Work[Any, Any]:
        if self.work is None:
            try:
                os.chdir(self.folder)  # what is given relative to it must be found
            except OSError as error:
                raise ValueError(
                    f"The machine {socket.gethostname()} has no folder {self.folder} ({error.strerror}); start in a "
                    "folder on a disk that all machines share."
                ) from error
            self.work = self.make()
        return self.work


def _named(piece: Any) -> str:
    """Name a piece of work, which is a number or a sequence, in an error."""
    several = isinstance(piece, Sequence) and not isinstance(piece, str) and len(piece) > 1
    return f"The work from {piece[0]} to {piece[-1]}" if several else f"The work at {piece}"
