"""How a warning and a failure look: in colour on a terminal, unless NO_COLOR is set (https://no-color.org)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_YELLOW, _RED, _PLAIN = "\033[33m", "\033[31m", "\033[0m"


def warning(text: str, stream: TextIO | None = None) -> str:
    """``text`` as a line that is seen to be a warning; ``stream``: where it will be printed, default stdout."""
    return f"{_coloured('warning:', _YELLOW, stream or sys.stdout)} {text}"


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(warning(text, sys.stderr), file=sys.stderr)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, what the package warns of by ``warnings.warn`` reads like any other warning, without place and source."""
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
    """Within, a terminal shows that something is being done: importing torch and diffusers takes seconds."""
    shown = sys.stderr.isatty()
    if shown:
        print("loading ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def tolerant(say: Callable[[str], None]) -> Callable[[str], None]:
    """Wrap ``say`` so that a terminal or pipe which is gone does not stop the work."""

    def said(text: str) -> None:
        with suppress(OSError):
            say(text)

    return said


@contextmanager
def working(what: str, shown: bool = True) -> Iterator[None]:
    """Show on stderr that ``what`` is being done, as a sign of life; afterwards the line is gone."""
    from tqdm import tqdm  # not needed by who only warns

    options: dict[str, Any] = {} if shown else {"disable": True}  # where shown, TQDM_DISABLE decides
    with tqdm(desc=what, bar_format="{desc} ...", leave=False, **options):
        yield


def fail(program: str, error: object) -> None:
    """Print on stderr why ``program`` ends."""
    print(f"{_coloured(f'{program}:', _RED, sys.stderr)} {error}", file=sys.stderr)


def _coloured(text: str, colour: str, stream: TextIO) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"{colour}{text}{_PLAIN}"
