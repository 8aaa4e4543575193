"""Train a local adapter: `python train_adapter.py` or `accelerate launch train_adapter.py`; `--help` lists settings.

Without arguments: canny edges inside box masks, on the embedded base and scenes, in minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from localctl.allocator import keep_freed_memory
from localctl.cli.program import explained, report_error
from localctl.launchers import launcher, read_launcher
from localctl.messages import fail, loading, log_to_screen, plain_warnings
from localctl.signals import Signalled, ending_at_once, exit_code
from localctl.threads import yield_waiting_cores

PROGRAM = "train_adapter.py"


@plain_warnings()
@log_to_screen(tolerant=True, first_process_only=True)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Train as ``argv`` says.

    Returns 0; 1 if training failed and 2 after a user's error, each printed in one sentence; 129 after SIGHUP, 130
    after SIGINT and 143 after SIGTERM, with a checkpoint unless the signal came before the first step.
    """
    parent = launcher()
    yield_waiting_cores()
    read_launcher(slurm=True)
    try:
        with ending_at_once():
            run = _prepare(sys.argv[1:] if argv is None else argv, parent, program)
        return run if isinstance(run, int) else _train(run, program)
    except Signalled as signal:
        _fail(program, f"stopped by {signal} before the first step; nothing was trained.", follows=True)
        return exit_code(signal.number)
    except KeyboardInterrupt:
        _fail(
            program,
            "interrupted twice; --resume_from_checkpoint latest continues from the last checkpoint.",
            follows=True,
        )
        return 130
    finally:
        _leave()


def _prepare(argv: Sequence[str], parent: int | None, program: str) -> Any:
    """Return the run that ``argv`` describes, or an exit code if there is nothing to train."""
    # Imported here, so that signals are handled meanwhile, and that torch is loaded only after the flags are read.
    from localctl.cli.training_flags import settings_to_run
    from localctl.training.settings import TrainSettings

    try:
        about = explained(__doc__, program)
        settings = settings_to_run(program, argv, TrainSettings, about, estimate="localctl.training.cost")
        if settings is None:
            return 0
        with loading():
            from localctl.evaluation.scorer import make_scorer
            from localctl.training.loop import prepare

        return prepare(settings, scorer=make_scorer(settings), parent=parent)
    except (ValueError, OSError) as error:
        return report_error(program, error)


def _train(run: Any, program: str) -> int:
    from localctl.data.bad_rows import TooManyBadRows
    from localctl.training.loop import NotFiniteError

    if run.state.accelerator.device.type == "cpu":
        keep_freed_memory()
    try:
        result = run.train()
    except TooManyBadRows as error:  # a user's error, although it is found late
        _fail(program, error)
        return 2
    except (OSError, NotFiniteError) as error:  # the disk is full, or a value is not finite
        _fail(program, error)
        return 1
    return exit_code(result.signal) if result.signal else 0


def _leave() -> None:
    """Leave the process group, if one may have been joined."""
    if "localctl.distributed" in sys.modules:
        from localctl.distributed import leave

        leave()


def _fail(program: str, text: object, follows: bool = False) -> None:
    with suppress(OSError):  # stderr may be closed
        fail(program, text, follows)
