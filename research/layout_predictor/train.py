r"""Train a layout predictor: `python -m research.layout_predictor.train`, `--help` for settings.

Without arguments: on the embedded scenes and their captions. On MSCOCO 2017:

  python -m research.layout_predictor.train data.name=coco \
      data.instances=instances_train2017.json data.stuff=stuff_train2017.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.cli.config import settings_or_help
from localctl.cli.program import one_sentence
from localctl.messages import fail, loading
from research.layout_predictor.settings import ALIASES, LayoutTrainSettings

CONFIG = "train_layout_predictor"
PROGRAM = "research.layout_predictor.train"


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Train with the settings in ``argv``.

    Returns 0; 1 if training failed and 2 after a user's error, each with one sentence on stderr; 130 after SIGINT and
    143 after SIGTERM, with a checkpoint saved.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = settings_or_help(PROGRAM, argv, LayoutTrainSettings, about=__doc__, aliases=ALIASES, name=CONFIG)
    return 0 if settings is None else _train(settings)


def _train(settings: LayoutTrainSettings) -> int:
    with loading():
        from localctl.signals import exit_code
        from research.layout_predictor.training import prepare
        from research.training_loop import NotFiniteError

    run = prepare(settings)
    try:
        signal = run.train()
    except NotFiniteError as error:
        fail(PROGRAM, error)
        return 1
    return exit_code(signal) if signal else 0


if __name__ == "__main__":
    sys.exit(main())
