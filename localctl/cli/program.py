"""How programs tell their user what went wrong."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec

from localctl.messages import fail, log_to_screen, plain_warnings

Arguments = ParamSpec("Arguments")
CONSOLE = "localctl"
# The scripts of a checkout, and what the console script calls the same thing.
SCRIPTS = {
    "python train_adapter.py": "localctl train",
    "python sample.py": "localctl sample",
    "python evaluate_fid.py": "localctl evaluate fid",
    "python evaluate_quantitative_metrics.py": "localctl evaluate metrics",
    "python -m localctl.data check": "localctl check-data",
    "python -m localctl.layout_predictor": "localctl predict-layout",
}


def explained(doc: str | None, program: str) -> str:
    """What ``--help`` begins with, the docstring of a program, with the commands as its user types them."""
    text = doc or ""
    if program.startswith(f"{CONSOLE} "):
        for script, command in SCRIPTS.items():
            text = text.replace(script, command)
    return text


def ended(program: str, error: ValueError | OSError) -> int:
    """The exit code of an ``error``, which becomes one sentence on stderr: 2 for a ValueError, a mistake of the user's,
    and 1 for an OSError, such as a full disk. Nothing is said, with 1 as well, where the reader of stdout has gone, as
    ``--help | head`` does."""
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return 1
    with suppress(OSError):  # nor may anybody read stderr
        fail(program, error)
    return 2 if isinstance(error, ValueError) else 1


def _nobody_reads() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it ends
        return True
    return False


def one_sentence(program: str) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Decorate a ``main``: what goes wrong in it becomes one sentence on stderr, behind the name of the ``program`` (or
    of its argument of that name), and an exit code (:func:`ended`). Any other exception is a mistake of ours and goes
    its way."""

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            try:
                with plain_warnings(), log_to_screen():
                    code = main(*args, **kwargs)
                    print(end="", flush=True)  # what is not read is found out here, not when Python ends
                    return code
            except (ValueError, OSError) as error:
                return ended(str(kwargs.get("program", program)), error)

        return guarded

    return decorate
