"""`python -m localctl.data check ARGUMENTS`, with the arguments of `train_adapter.py`: check a dataset before training.

Reads every row as training would, prints counts, bad rows and likely mistakes, and writes a sheet of examples. Further
arguments: `--preview FILE.png`, `--preview_rows 8`, and `--adapter_model_name_or_path FOLDER` to check that an adapter
takes these conditions. Exit code 0; 2 after a mistake in the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.cli.program import explained, one_sentence
from localctl.cli.training_flags import CheckSettings, training_settings
from localctl.messages import loading

PROGRAM = "python -m localctl.data check"


@one_sentence("python -m localctl.data")
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the check. Returns 0 whatever it found; 2 after a user's error, printed in one sentence."""
    argv = list(sys.argv[1:] if argv is None else argv)
    wants_help = {"-h", "--help", "--version"} & set(argv)
    if program == PROGRAM and argv[:1] != ["check"] and not wants_help:
        raise ValueError("The command is missing; write `python -m localctl.data check data.path=FOLDER`.")
    rest = argv[1:] if program == PROGRAM and argv[:1] == ["check"] else argv
    settings = training_settings(program, rest, CheckSettings, explained(__doc__, program))
    if settings is None:
        return 0
    with loading():
        from localctl.cli.checking import check

    print(check(settings))
    return 0
