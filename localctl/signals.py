"""Being told to stop without losing work: the first SIGINT, SIGTERM or SIGHUP asks to stop at the next good moment, the
second acts at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_TORCHRUN, _ACCELERATE = "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"  # what the launchers set


class Signalled(BaseException):
    """A signal came where there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupt:
    """Context in which the first signal is only noted, in ``signal`` (its number, 0 before), and gives all of them back
    to their former handlers.

    launcher: the process that started this one and passes signals on; when it is gone, nobody would, so that counts
    as SIGTERM. None: there is no such process.
    """

    def __init__(self, launcher: int | None = None) -> None:
        self.launcher = launcher
        self._noted = 0
        self._former: dict[int, Any] = {}

    @property
    def signal(self) -> int:
        """The number of the signal that asked to stop; 0: none did."""
        return self._noted or (signal.SIGTERM if self.orphaned else 0)

    @property
    def orphaned(self) -> bool:
        """Whether the launcher is gone."""
        return self.launcher is not None and os.getppid() != self.launcher

    def ask_to_stop(self) -> None:
        """As a SIGTERM does."""
        self._noted = self._noted or signal.SIGTERM

    def __enter__(self) -> Interrupt:
        self._former = _set_handlers(self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        self._give_back()

    def _give_back(self) -> None:
        while self._former:
            _set_back(*self._former.popitem())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Context in which there is nothing to save yet: a signal raises :class:`Signalled` at once."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Signalled(number)

    former = _set_handlers(end)
    try:
        yield
    finally:
        for number, handler in former.items():
            _set_back(number, handler)


def launcher() -> int | None:
    """Return the process id of torchrun or `accelerate launch`, where one of them started this process."""
    parent = os.getppid()
    started = _TORCHRUN in os.environ or (_ACCELERATE in os.environ and _is_accelerate(parent))
    return parent if started else None


def _is_accelerate(pid: int) -> bool:
    """Whether a process is `accelerate launch`, as users set its variables, too; yes where the system does not say."""
    try:
        return b"accelerate" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def exit_code(number: int) -> int:
    """Return what a process ends with that was stopped by signal ``number``: 129 for SIGHUP, 130 for SIGINT, 143 for
    SIGTERM."""
    return 128 + number


def ignore_signals(worker: int) -> None:
    """For data workers: signals reach the whole group of processes, and only the first may decide when to stop. A
    worker ends when its parent ends it or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _set_handlers(handler: Any) -> dict[int, Any]:
    """Set ``handler`` for all signals; number -> former handler. ``nohup`` has SIGHUP ignored, and so it stays."""
    if threading.current_thread() is not threading.main_thread():  # nobody else may set handlers
        return {}
    hangup = getattr(signal, "SIGHUP", None)
    wanted = [n for n in SIGNALS if n != hangup or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _set_back(number: int, handler: Any) -> None:
    # None: set by somebody else than Python, who alone could set it again
    signal.signal(number, signal.SIG_DFL if handler is None else handler)
