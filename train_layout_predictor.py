r"""Train a layout predictor: `python train_layout_predictor.py`, `--help` for settings.

Without arguments: on the embedded scenes and their captions. On MSCOCO 2017:

  python train_layout_predictor.py data.name=coco \
      data.instances=instances_train2017.json data.stuff=stuff_train2017.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.layout_predictor.settings import ALIASES, LayoutTrainSettings
from localctl.layout_predictor.training import NotFiniteError, prepare
from localctl.run.config import help_text, load_config
from localctl.run.interrupt import exit_code

CONFIG = "train_layout_predictor"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as ``argv`` says. Returns 0; 1 when training failed and 2 after a user's error, each named in one sentence;
    130 after SIGINT and 143 after SIGTERM, with a checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if "-h" in argv or "--help" in argv:
            defaults = load_config([], LayoutTrainSettings, aliases=ALIASES, name=CONFIG)
            print(help_text("train_layout_predictor.py", defaults, aliases=ALIASES, name=CONFIG))
            return 0
        run = prepare(load_config(argv, LayoutTrainSettings, aliases=ALIASES, name=CONFIG))
    except ValueError as error:
        print(f"train_layout_predictor.py: {error}", file=sys.stderr)
        return 2
    try:
        signal = run.train()
    except (OSError, NotFiniteError) as error:  # the disk is full, or a number is not finite
        print(f"train_layout_predictor.py: {error}", file=sys.stderr)
        return 1
    return exit_code(signal) if signal else 0


if __name__ == "__main__":
    sys.exit(main())
