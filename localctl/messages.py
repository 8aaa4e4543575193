"""How a warning and a failure look: in colour on a terminal, unless NO_COLOR is set (https://no-color.org); and what to
say to somebody who wrote a name that is not known."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_CUTOFF = 0.75  # below, a suggestion is far-fetched
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


def nearest(name: str, known: Sequence[str], otherwise: str = "see --help.") -> str:
    """Return the end of a sentence: "did you mean X?", or ``otherwise`` when nothing known is near.

    A dotted name may also be asked for by its last part ("weight" for "loss.weight"); all that have it are named.
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
