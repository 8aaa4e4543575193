"""Train a local adapter: `python train_adapter.py` or `accelerate launch train_adapter.py`, `--help` for settings.

Without arguments: canny edges inside box masks, on the embedded base and scenes, in minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.data.bad import TooManyBadRows
from localctl.evaluation.scorer import make_scorer
from localctl.run.config import help_text, load_config
from localctl.run.interrupt import exit_code
from localctl.run.processes import leave
from localctl.training.dry_run import report
from localctl.training.loop import NotFiniteError, prepare
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Train as ``argv`` says. Returns 0; 1 when training failed and 2 after a user's error, each named in one sentence;
    130 after SIGINT and 143 after SIGTERM, with a checkpoint."""
    try:
        return _train(sys.argv[1:] if argv is None else argv)
    finally:
        leave()


def _train(argv: Sequence[str]) -> int:
    try:
        if "-h" in argv or "--help" in argv:
            defaults = load_config([], TrainSettings, aliases=ALIASES)
            print(help_text("train_adapter.py", defaults, aliases=ALIASES))
            return 0
        settings = load_config(argv, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS)
        if settings.dry_run:
            print(report(settings))
            return 0
        run = prepare(settings, scorer=make_scorer(settings))
    except ValueError as error:
        print(f"train_adapter.py: {error}", file=sys.stderr)
        return 2
    try:
        result = run.train()
    except TooManyBadRows as error:  # found out late, but the user's to repair
        print(f"train_adapter.py: {error}", file=sys.stderr)
        return 2
    except (OSError, NotFiniteError) as error:  # the disk is full, or a number is not finite
        print(f"train_adapter.py: {error}", file=sys.stderr)
        return 1
    return exit_code(result.signal) if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
