"""Ctrl-C without losing work: the first one asks to stop at the next good moment, the second stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Context in which the first SIGINT only sets ``requested`` and gives the signal back to its former handler."""

    def __init__(self) -> None:
        self.requested = False
        self._former: Any = None
        self._ours = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self._former = signal.signal(signal.SIGINT, self._handle)
            self._ours = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._give_back()

    def _give_back(self) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._former)
            self._ours = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()


def ignore_interrupt(worker: int) -> None:
    """For data workers: Ctrl-C reaches the whole group of processes, and only the first may decide when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
