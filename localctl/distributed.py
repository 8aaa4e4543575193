"""Several processes in one job, as started by torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from localctl.files import first_line
from localctl.messages import working
from localctl.signals import left_to_the_system

Result = TypeVar("Result")
Item = TypeVar("Item")


class LostProcess(OSError):
    """Another process of this job has ended; ``fail`` does not print this if that one has told why."""

    follows = True


def processes() -> tuple[int, int]:
    """Return (rank, count) from the environment that torchrun sets."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def process_device(name: str) -> torch.device:
    """Return the device of this process: ``auto`` spreads processes over the GPUs. ValueError if it is missing."""
    if name == "auto":
        count = torch.cuda.device_count()
        return torch.device("cuda", processes()[0] % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name!r} cannot be used here; try the device 'cpu'.") from error
    return device


def _is_joined() -> bool:
    """Return whether this process can communicate with others."""
    return distributed.is_available() and distributed.is_initialized()


def leave() -> None:
    """Leave the process group, if this process has joined one, after the last communication.

    Gloo's threads need Python's GIL once more to free the last message. ``destroy_process_group`` waits for them while
    it holds the GIL, so without a short pause both would wait without end."""
    if _is_joined():
        time.sleep(0.1)
        distributed.destroy_process_group()


@contextmanager
def joining() -> Iterator[None]:
    """Context in which this process waits for the others of the job: a signal ends it at once, and the first says on
    stderr what it waits for.

    ValueError if the environment does not say where they meet.
    """
    rank, count = processes()
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE={count} names {count} processes, but MASTER_ADDR does not say where they meet; start them "
            "with torchrun, or set MASTER_ADDR and MASTER_PORT to the first one's host and a free port there."
        )
    with left_to_the_system(), working(f"waiting for the other processes ({count} in all)", rank == 0):
        yield


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the processes of the job, so that metrics synchronise; yield (rank, count), which is (0, 1) for a single
    process. A process group that exists already is used, and not left at the end."""
    begun = _is_joined()
    if not begun and processes()[1] > 1:
        with joining():
            distributed.init_process_group("gloo")
    try:
        yield (distributed.get_rank(), distributed.get_world_size()) if _is_joined() else (0, 1)
    finally:
        if not begun:
            leave()


class Messages:
    """Small numbers that the processes of a job tell each other from host to host: no device has to finish its work
    first. All processes must make the same calls, the first of which is to make it.

    timeout: how long a process waits for the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._group: distributed.ProcessGroup | None = None
        self.alone = not _is_joined() or distributed.get_world_size() == 1
        if not self.alone and distributed.get_backend() != "gloo":
            self._group = distributed.new_group(backend="gloo", timeout=timeout)

    def largest(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes."""
        if self.alone:
            return list(values)
        numbers = torch.tensor(values)
        distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX, group=self._group)
        return numbers.tolist()


def union(items: set[Item]) -> set[Item]:
    """Return the union of the ``items`` of all processes that are joined."""
    if not _is_joined():
        return items
    shares: list[set[Item]] = [set() for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(shares, items)
    return set().union(*shares)


def on_first(work: Callable[[], Result]) -> Result | None:
    """Run ``work`` on the first process and return its result there; the others wait and return None. A ValueError or
    OSError is raised on all processes, so that none waits in vain."""
    together = _is_joined()
    result: Result | None = None
    failure: ValueError | OSError | None = None
    if not together or distributed.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
    if together:
        message = [None if failure is None else (isinstance(failure, ValueError), str(failure))]
        distributed.broadcast_object_list(message, src=0)
        if failure is None and message[0] is not None:
            failure = (ValueError if message[0][0] else OSError)(message[0][1])
    if failure is not None:
        raise failure
    return result


def lost_process(error: RuntimeError) -> LostProcess | None:
    """Return an error in one sentence if ``error`` is how torch reports that another process has ended; else None."""
    text = str(error)
    together = _is_joined() and distributed.get_world_size() > 1
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    if not together or not any(sign in text for sign in signs):
        return None
    return LostProcess(f"Another process of this job has ended ({first_line(error)[:200]})")
