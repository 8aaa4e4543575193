"""The queue of the studio: one job at a time, in the order they were asked for, with progress and cancelling."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from localctl.files import first_line
from localctl.messages import is_out_of_memory

logger = logging.getLogger(__name__)
MOST_WAITING = 8  # jobs, besides the running one
_TICK = 0.25  # seconds between two looks at whether a job was cancelled


class Stopped(Exception):
    """Raised inside a job that its user cancelled, or that took too long; its text is a sentence for the user."""


@dataclass(frozen=True)
class Waiting:
    """A job is behind ``ahead`` others."""

    ahead: int


@dataclass(frozen=True)
class Made:
    """Something that a job yielded: a result, or a report of its progress."""

    item: Any


Check = Callable[[], None]


class JobQueue:
    """Runs jobs one at a time.

    Args:
        time_limit: seconds after which a job is stopped.
        most_waiting: further jobs are refused.
    """

    def __init__(self, time_limit: float = 900.0, most_waiting: int = MOST_WAITING) -> None:
        self.time_limit = time_limit
        self.most_waiting = most_waiting
        self._tickets: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def length(self) -> int:
        """The number of jobs, running or waiting."""
        return len(self._tickets)

    def run(
        self, work: Callable[[Callable[[Any], None], Check], None], cancelled: threading.Event
    ) -> Iterator[Waiting | Made]:
        """Wait for the jobs before this one, run ``work`` in a thread, and yield what it reports.

        work: called with ``report``, which passes an item on, and ``check``, to be called often, which raises
        :class:`Stopped` once the job was cancelled or its time is over. Whatever it raises is raised here.

        ValueError when too many jobs are waiting. When the caller stops iterating, as when its tab is closed, the job
        is cancelled and its end awaited.
        """
        ticket = object()
        with self._changed:
            if len(self._tickets) > self.most_waiting:
                raise ValueError(f"{self.most_waiting} jobs are waiting already; try again in a minute.")
            self._tickets.append(ticket)
        try:
            yield from self._wait(ticket, cancelled)
            yield from self._work(work, cancelled)
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def _wait(self, ticket: object, cancelled: threading.Event) -> Iterator[Waiting]:
        shown = 0
        while True:
            with self._changed:
                ahead = self._tickets.index(ticket)
                if not ahead:
                    return
                if ahead == shown:
                    self._changed.wait(_TICK)
            if cancelled.is_set():
                raise Stopped("Cancelled while it was waiting.")
            if ahead != shown:
                shown = ahead
                yield Waiting(ahead)

    def _work(self, work: Callable[[Callable[[Any], None], Check], None], cancelled: threading.Event) -> Iterator[Made]:
        made: queue.SimpleQueue[Made | BaseException | None] = queue.SimpleQueue()
        until = time.monotonic() + self.time_limit

        def check() -> None:
            if cancelled.is_set():
                raise Stopped("Cancelled.")
            if time.monotonic() > until:
                raise Stopped(f"Stopped after {self.time_limit:.0f} s, the limit of a job on this server.")

        def target() -> None:
            try:
                check()
                work(lambda item: made.put(Made(item)), check)
                made.put(None)
            except BaseException as error:  # raised again where the job was asked for
                made.put(error)

        thread = threading.Thread(target=target, name="studio job", daemon=True)
        thread.start()
        try:
            while (item := made.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            cancelled.set()
            thread.join()


def sentence(error: BaseException) -> str:
    """Return one sentence for the user on what ended a job; a bug is logged with its traceback."""
    if isinstance(error, (Stopped, ValueError)):
        return str(error)
    if is_out_of_memory(error):
        return (
            "There is not enough memory for this; choose a smaller size, fewer images at once or fewer regions. "
            "The next job starts afresh."
        )
    if isinstance(error, OSError):
        return f"A file could not be read or written ({error.strerror or first_line(error)})."
    logger.error("a job of the studio failed", exc_info=error)
    return f"This failed on the server ({type(error).__name__}); its log says more."
