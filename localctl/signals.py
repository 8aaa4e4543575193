"""Stop on a signal without losing work: the first SIGINT, SIGTERM or SIGHUP asks to stop at the next safe point, the
second one has its usual effect at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
ECHO = 1.0  # seconds: a cluster signals launcher and processes alike, and the launcher forwards what it gets


class Signalled(BaseException):
    """A signal arrived while there was nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupt:
    """Context in which the first signal is only recorded, in ``signal``; then the former handlers are restored.

    With a launcher, signals within ``ECHO`` seconds of the first are the same request: it may arrive twice.

    launcher: id of the process that started this one and forwards signals; if it has ended, nobody forwards them, so
    this counts as SIGTERM. None: there is no such process.
    """

    def __init__(self, launcher: int | None = None) -> None:
        self.launcher = launcher
        self._noted, self._first = 0, 0.0
        self._former: dict[int, Any] = {}

    @property
    def signal(self) -> int:
        """Number of the signal that asked to stop; 0 if there was none."""
        return self._noted or (signal.SIGTERM if self.orphaned else 0)

    @property
    def orphaned(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher is not None and os.getppid() != self.launcher

    def ask_to_stop(self) -> None:
        """Ask to stop as SIGTERM does."""
        self._noted = self._noted or signal.SIGTERM

    def __enter__(self) -> Interrupt:
        self._former = _set_handlers(self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._noted:
            self._noted, self._first = number, time.monotonic()
            if self.launcher is None:
                self._restore()
        elif time.monotonic() - self._first > ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._former:
            _restore_handler(*self._former.popitem())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Context with nothing to save yet: a signal raises :class:`Signalled` at once."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Signalled(number)

    former = _set_handlers(end)
    try:
        yield
    finally:
        for number, handler in former.items():
            _restore_handler(number, handler)


def exit_code(number: int) -> int:
    """Return the exit code after signal ``number``: 129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def left_to_the_system() -> Iterator[None]:
    """Context in which signals end the process as the system itself does it: while a library waits, no handler that is
    written in Python runs. For times at which there is nothing to save."""
    former = _set_handlers(signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in former.items():
            _restore_handler(number, handler)


def ignore_signals(worker: int) -> None:
    """Ignore signals in a data worker: they reach the whole process group, and only the parent decides when to stop. A
    worker ends when its parent kills it or has ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _set_handlers(handler: Any) -> dict[int, Any]:
    """Set ``handler`` for all signals; return number -> former handler. SIGHUP stays ignored under ``nohup``."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        return {}
    hangup = getattr(signal, "SIGHUP", None)
    wanted = [n for n in SIGNALS if n != hangup or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _restore_handler(number: int, handler: Any) -> None:
    # None: a handler that was not set from Python, and cannot be restored from it
    signal.signal(number, signal.SIG_DFL if handler is None else handler)
