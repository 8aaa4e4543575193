"""Train a local adapter: `python train_adapter.py` or `accelerate launch train_adapter.py`, `--help` for settings.

Without arguments: canny edges inside box masks, on the embedded base and scenes, in minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from localctl.cli.program import ended, explained
from localctl.messages import fail, loading, log_to_screen, plain_warnings
from localctl.signals import Signalled, ending_at_once, exit_code, launcher

PROGRAM = "train_adapter.py"


@plain_warnings()
@log_to_screen(tolerant=True, first_process_only=True)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Train as ``argv`` says. Returns 0; 1 when training failed and 2 after a user's error, each named in one sentence;
    129 after SIGHUP, 130 after SIGINT and 143 after SIGTERM, with a checkpoint unless it came before the first step."""
    parent = launcher()
    try:
        with ending_at_once():
            run = _prepare(sys.argv[1:] if argv is None else argv, parent, program)
        return run if isinstance(run, int) else _train(run, program)
    except Signalled as signal:
        _tell(program, f"stopped by {signal} before the first step; nothing was trained.")
        return exit_code(signal.number)
    except KeyboardInterrupt:
        _tell(program, "interrupted a second time; --resume_from_checkpoint latest goes on from the last checkpoint.")
        return 130
    finally:
        _leave()


def _prepare(argv: Sequence[str], parent: int | None, program: str) -> Any:
    """The run that ``argv`` asks for, or the exit code where nothing is to be trained."""
    # Imported here, so that a signal that comes meanwhile is heard; and torch only after the flags were read.
    from localctl.cli.training_flags import training_settings
    from localctl.training.settings import TrainSettings

    try:
        settings = training_settings(program, argv, TrainSettings, explained(__doc__, program))
        if settings is None:
            return 0
        with loading():
            from localctl.evaluation.scorer import make_scorer
            from localctl.training.cost import report
            from localctl.training.loop import prepare

        if settings.dry_run:
            print(report(settings))
            return 0
        return prepare(settings, scorer=make_scorer(settings), parent=parent)
    except (ValueError, OSError) as error:
        return ended(program, error)


def _train(run: Any, program: str) -> int:
    from localctl.data.bad_rows import TooManyBadRows
    from localctl.training.loop import NotFiniteError

    try:
        result = run.train()
    except TooManyBadRows as error:  # found out late, but the user's to repair
        _tell(program, error)
        return 2
    except (OSError, NotFiniteError) as error:  # the disk is full, or a number is not finite
        _tell(program, error)
        return 1
    return exit_code(result.signal) if result.signal else 0


def _leave() -> None:
    """Let go of other processes, if they were ever met."""
    if "localctl.distributed" in sys.modules:
        from localctl.distributed import leave

        leave()


def _tell(program: str, text: object) -> None:
    with suppress(OSError):  # nobody listens any more
        fail(program, text)
