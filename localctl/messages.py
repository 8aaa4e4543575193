"""Warnings, errors and suggestions for mistyped names. Output on a terminal is coloured, unless NO_COLOR is set
(https://no-color.org)."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from localctl.launchers import is_first, tells

LOGGERS = ("localctl", "research")  # the packages whose messages are shown
_CUTOFF = 0.75  # similarity of a suggestion; below this it is far-fetched
_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # of CUDA, and of CPUs
_YELLOW, _RED, _PLAIN = "\033[33m", "\033[31m", "\033[0m"


def warning(text: str, stream: TextIO | None = None) -> str:
    """Return ``text`` with the prefix of a warning; ``stream``: where it will be printed, default stdout."""
    return f"{_coloured('warning:', _YELLOW, stream or sys.stdout)} {text}"


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(warning(text, sys.stderr), file=sys.stderr)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the machine ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _MEMORY)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Context in which a UserWarning is printed like :func:`warn` does, without its place in the source."""
    before = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> str:
        if category is UserWarning:
            return warning(str(message), sys.stderr) + "\n"
        return before(message, category, filename, *rest, **more)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def loading() -> Iterator[None]:
    """Context in which a terminal shows "loading ...": importing torch and diffusers takes seconds."""
    visible = sys.stderr.isatty() and is_first()
    if visible:
        print("loading ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class BareFormatter(logging.Formatter):
    """Formats a record as its message alone; a warning begins with "warning:", in colour on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return warning(text) if record.levelno >= logging.WARNING else text


class ScreenHandler(logging.Handler):
    """Hands each formatted message to ``write``; None: to standard output, above any progress bar.

    ``tolerant``: ignore an OSError, of a closed pipe or a full disk. ``first_process_only``: write nothing in the other
    processes that torchrun started.
    """

    def __init__(self, write: Callable[[str], None] | None, tolerant: bool, first_process_only: bool) -> None:
        super().__init__()
        self.setFormatter(BareFormatter())
        self._write, self._tolerant, self._first_process_only = write, tolerant, first_process_only

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # programs that log nothing do not need it

        if self._first_process_only and not is_first():
            return
        try:
            (self._write or tqdm.write)(self.format(record))  # tqdm looks sys.stdout up now
        except OSError:
            if not self._tolerant:
                raise


@contextmanager
def log_to_screen(
    write: Callable[[str], None] | None = None, *, tolerant: bool = False, first_process_only: bool = False
) -> Iterator[None]:
    """Within, show what localctl and research log at INFO and above through a :class:`ScreenHandler`, whose arguments
    these are. It replaces the one of an outer ``log_to_screen``; other handlers and other libraries' loggers stay."""
    handler = ScreenHandler(write, tolerant, first_process_only)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    for logger, handlers, level, _ in before:
        logger.handlers = [other for other in handlers if not isinstance(other, ScreenHandler)] + [handler]
        logger.setLevel(level or logging.INFO)  # a level that the user set stays
        logger.propagate = False  # a handler of the root logger would show each line twice
    try:
        yield
    finally:
        for logger, logger.handlers, level, logger.propagate in before:
            logger.setLevel(level)


@contextmanager
def working(what: str, shown: bool = True) -> Iterator[None]:
    """Context in which a line on stderr shows that ``what`` is in progress; the line is removed afterwards."""
    from tqdm import tqdm  # not loaded for warnings alone

    options: dict[str, Any] = {} if shown else {"disable": True}  # no disable=False, which would override TQDM_DISABLE
    with tqdm(desc=what, bar_format="{desc} ...", leave=False, **options):
        yield


def fail(program: str, error: object, follows: bool = False) -> None:
    """Print on stderr the error with which ``program`` ends; of several processes, one prints it.

    follows: the error is what the end of another process leads to, and is not printed if that has told its own; or the
    error has an attribute of this name.
    """
    if tells(str(error), follows or getattr(error, "follows", False)):
        print(f"{_coloured(f'{program}:', _RED, sys.stderr)} {error}", file=sys.stderr)


def _coloured(text: str, colour: str, stream: TextIO) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"{colour}{text}{_PLAIN}"


def nearest(name: str, known: Sequence[str], otherwise: str = "see --help.") -> str:
    """Return the end of an error sentence: "did you mean X?", or ``otherwise`` when no known name is similar.

    A dotted name is also found by its last part ("weight" for "loss.weight"); all names with this part are listed.
    """
    dashes = "--" if name.startswith("--") else ""
    same = [item for item in known if item.rsplit(".", 1)[-1].removeprefix("--") == name.removeprefix("--")]
    if not same:
        by_last_part: dict[str, list[str]] = {}
        for item in known:
            by_last_part.setdefault(dashes + item.rsplit(".", 1)[-1].removeprefix("--"), []).append(item)
        near = difflib.get_close_matches(name, [*known, *by_last_part], n=1, cutoff=_CUTOFF)
        same = by_last_part.get(near[0], near) if near else []
        if near and near[0] in known:
            same = near
    return f"did you mean {' or '.join(same)}?" if same else otherwise


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Context without the progress bars of diffusers and transformers: one per file would bury a program's output."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [(library, library.is_progress_bar_enabled()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, enabled in libraries:
            if enabled:
                library.enable_progress_bar()
