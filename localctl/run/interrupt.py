"""Being told to stop without losing work: the first SIGINT or SIGTERM asks to stop at the next good moment, the second
acts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Context in which the first SIGINT or SIGTERM is only noted, in ``signal`` (its number, 0 before), and gives both
    signals back to their former handlers."""

    def __init__(self) -> None:
        self.signal = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._give_back()

    def _give_back(self) -> None:
        while self._former:
            number, handler = self._former.popitem()
            # None: set by somebody else than Python, who alone could set it again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()


def exit_code(number: int) -> int:
    """What a process ends with that was stopped by signal ``number``: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


def ignore_signals(worker: int) -> None:
    """For data workers: signals reach the whole group of processes, and only the first may decide when to stop. A
    worker ends when its parent asks it to or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
