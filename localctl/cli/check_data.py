"""`python -m localctl.data check ARGUMENTS`, with the arguments of `train_adapter.py`: reads every row as the training
would, prints counts, bad rows and what looks like a mistake, and writes a sheet of examples.

More arguments: `--preview FILE.png`, `--preview_rows 8`, `--adapter_model_name_or_path FOLDER` to compare channels with
an adapter. Ends with 0; 2 after a mistake in the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.cli.check_settings import CheckSettings
from localctl.cli.program import explained, one_sentence
from localctl.cli.training_flags import training_settings
from localctl.messages import loading

PROGRAM = "python -m localctl.data check"


@one_sentence("python -m localctl.data")
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """0 when the check ran, whatever it found; 2 after a mistake of the user's, named in one sentence."""
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = {"-h", "--help", "--version"} & set(argv)
    if program == PROGRAM and argv[:1] != ["check"] and not asked:
        raise ValueError("Say what to do: check, as in `python -m localctl.data check data.path=FOLDER`; see --help.")
    rest = argv[1:] if program == PROGRAM and argv[:1] == ["check"] else argv
    settings = training_settings(program, rest, CheckSettings, explained(__doc__, program))
    if settings is None:
        return 0
    with loading():
        from localctl.cli.checking import check

    print(check(settings))
    return 0
