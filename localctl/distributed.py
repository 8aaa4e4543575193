"""Several processes on one job, as torchrun starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed

from localctl.files import first_line

Result = TypeVar("Result")
Item = TypeVar("Item")


class LostProcess(OSError):
    """Another process of this job is gone."""


def processes() -> tuple[int, int]:
    """(rank, count) as torchrun tells."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def process_device(name: str) -> torch.device:
    """Of this process: ``auto`` spreads the processes over the GPUs. ValueError for a device that is not there."""
    if name == "auto":
        count = torch.cuda.device_count()
        return torch.device("cuda", processes()[0] % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name!r} cannot be used here; try the device 'cpu'.") from error
    return device


def _together() -> bool:
    """Whether this process can exchange with others."""
    return distributed.is_available() and distributed.is_initialized()


def leave() -> None:
    """Let go of the other processes, if there are any, after the last exchange with them.

    Gloo's threads need Python's lock once more to let go of what was exchanged last. When the group goes first, it
    waits for them with that lock held, for ever. So they get a moment."""
    if _together():
        time.sleep(0.1)
        distributed.destroy_process_group()


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """(rank, count) of processes that can exchange results, which metrics then do by themselves; (0, 1) for one
    alone. Whoever has joined them before keeps them."""
    begun = _together()
    if not begun and processes()[1] > 1:
        distributed.init_process_group("gloo")
    try:
        yield (distributed.get_rank(), distributed.get_world_size()) if _together() else (0, 1)
    finally:
        if not begun:
            leave()


def union(items: set[Item]) -> set[Item]:
    """Return the ``items`` of all processes, within :func:`joined`."""
    if not _together():
        return items
    shares: list[set[Item]] = [set() for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(shares, items)
    return set().union(*shares)


def on_first(work: Callable[[], Result]) -> Result | None:
    """Run ``work`` on the first process and return its result there; the others wait and get None. A ValueError or
    OSError of it is raised on all of them, so that none waits in vain."""
    together = _together()
    result: Result | None = None
    failure: ValueError | OSError | None = None
    if not together or distributed.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
    if together:
        told = [None if failure is None else (isinstance(failure, ValueError), str(failure))]
        distributed.broadcast_object_list(told, src=0)
        if failure is None and told[0] is not None:
            failure = (ValueError if told[0][0] else OSError)(told[0][1])
    if failure is not None:
        raise failure
    return result


def lost_process(error: RuntimeError) -> LostProcess | None:
    """``error`` as a sentence, where it is how torch tells that another process of the job is gone; else None."""
    text = str(error)
    together = _together() and distributed.get_world_size() > 1
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    if not together or not any(sign in text for sign in signs):
        return None
    return LostProcess(f"Another process of this job is gone ({first_line(error)[:200]})")
