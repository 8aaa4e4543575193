"""How programs tell their user what went wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

from localctl.run.messages import fail, plain_warnings

Arguments = ParamSpec("Arguments")


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
