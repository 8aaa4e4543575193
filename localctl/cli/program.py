"""Exit codes and error messages of programs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec

from localctl.launchers import read_launcher
from localctl.messages import fail, log_to_screen, plain_warnings
from localctl.threads import yield_waiting_cores

Arguments = ParamSpec("Arguments")
CONSOLE = "localctl"
# Scripts of a checkout -> the same commands of the console script.
SCRIPTS = {
    "python train_adapter.py": "localctl train",
    "python sample.py": "localctl sample",
    "python app.py": "localctl studio",
    "python evaluate_fid.py": "localctl evaluate fid",
    "python evaluate_quantitative_metrics.py": "localctl evaluate metrics",
    "python -m localctl.data check": "localctl check-data",
    "python -m localctl.layout_predictor": "localctl predict-layout",
}


def explained(doc: str | None, program: str) -> str:
    """Return the docstring ``doc`` for ``--help``, with the commands of the console script if ``program`` is one."""
    text = doc or ""
    if program.startswith(f"{CONSOLE} "):
        for script, command in SCRIPTS.items():
            text = text.replace(script, command)
    return text


def report_error(program: str, error: ValueError | OSError) -> int:
    """Print ``error`` as one sentence on stderr and return the exit code: 2 for a ValueError, which is a user's error,
    1 for an OSError, such as a full disk. If the reader of stdout has ended, as in ``--help | head``, print nothing and
    return 1."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return 1
    with suppress(OSError):  # stderr may be closed, too
        fail(program, error)
    return 2 if isinstance(error, ValueError) else 1


def _stdout_is_closed() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports the error again at exit
        return True
    return False


def one_sentence(program: str) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Decorate a ``main``: choose how threads wait, see :func:`yield_waiting_cores`, and turn a ValueError or OSError
    into one sentence on stderr, see :func:`report_error`.

    The sentence starts with ``program``, or with the argument of that name. Other exceptions are bugs and are not
    caught.
    """

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            yield_waiting_cores()
            read_launcher()
            try:
                with plain_warnings(), log_to_screen():
                    code = main(*args, **kwargs)
                    print(end="", flush=True)  # raises here, not at exit, if stdout is closed
                    return code
            except (ValueError, OSError) as error:
                return report_error(str(kwargs.get("program", program)), error)

        return guarded

    return decorate
