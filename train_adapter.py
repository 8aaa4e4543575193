"""Train a local adapter: `python train_adapter.py` or `accelerate launch train_adapter.py`, `--help` for settings.

Without arguments: canny edges inside box masks, on the embedded base and scenes, in minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.run.config import settings_or_help
from localctl.run.messages import fail, loading, plain_warnings
from localctl.training.other_flags import ELSEWHERE
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

PROGRAM = "train_adapter.py"


@plain_warnings()
def main(argv: Sequence[str] | None = None) -> int:
    """Train as ``argv`` says. Returns 0; 1 when training failed and 2 after a user's error, each named in one sentence;
    130 after SIGINT and 143 after SIGTERM, with a checkpoint."""
    try:
        settings = settings_or_help(
            PROGRAM,
            sys.argv[1:] if argv is None else argv,
            TrainSettings,
            about=__doc__,
            aliases=ALIASES,
            free_groups=FREE_GROUPS,
            elsewhere=ELSEWHERE,
        )
    except ValueError as error:
        fail(PROGRAM, error)
        return 2
    if settings is None:
        return 0
    with loading():
        from localctl.run.processes import leave

    try:
        return _train(settings)
    finally:
        leave()


def _train(settings: TrainSettings) -> int:
    with loading():
        from localctl.data.bad import TooManyBadRows
        from localctl.evaluation.scorer import make_scorer
        from localctl.run.interrupt import exit_code
        from localctl.training.dry_run import report
        from localctl.training.loop import NotFiniteError, prepare

    try:
        if settings.dry_run:
            print(report(settings))
            return 0
        run = prepare(settings, scorer=make_scorer(settings))
    except ValueError as error:
        fail(PROGRAM, error)
        return 2
    try:
        result = run.train()
    except TooManyBadRows as error:  # found out late, but the user's to repair
        fail(PROGRAM, error)
        return 2
    except (OSError, NotFiniteError) as error:  # the disk is full, or a number is not finite
        fail(PROGRAM, error)
        return 1
    return exit_code(result.signal) if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
