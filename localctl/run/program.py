"""How programs tell their user what went wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec

from tqdm import tqdm

from localctl.run.messages import fail, plain_warnings

Arguments = ParamSpec("Arguments")


def tolerant(say: Callable[[str], None]) -> Callable[[str], None]:
    """``say`` that a terminal or pipe which is gone does not stop: nobody listens any more, but the work goes on."""

    def said(text: str) -> None:
        with suppress(OSError):
            say(text)

    return said


@contextmanager
def working(what: str, shown: bool = True) -> Iterator[None]:
    """Context in which stderr shows ``what`` is being done, as a sign of life; after it the line is gone."""
    options: dict[str, Any] = {} if shown else {"disable": True}  # where shown, TQDM_DISABLE decides
    with tqdm(desc=what, bar_format="{desc} ...", leave=False, **options):
        yield


def one_sentence(program: str) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Decorates a ``main``: what goes wrong in it becomes one sentence on stderr, behind the name of the ``program``,
    and an exit code: 2 for a ValueError, a mistake of the user's, and 1 for an OSError, such as a full disk. Any other
    exception is a mistake of ours and goes its way."""

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            try:
                with plain_warnings():
                    return main(*args, **kwargs)
            except (ValueError, OSError) as error:
                fail(program, error)
                return 2 if isinstance(error, ValueError) else 1

        return guarded

    return decorate
