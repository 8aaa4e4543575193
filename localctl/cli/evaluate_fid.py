"""Compare generated images with photos: Fréchet distance (FID with Inception), KID, CMMD, CLIP score.

  python evaluate_fid.py ref   data=imagefolder data.path=PHOTOS extractor=fid     statistics of the photos, once
  python evaluate_fid.py gen   adapter=outputs/adapter prompts=both                generate images; repeat to resume
  torchrun --nproc_per_node 2 evaluate_fid.py gen ...                              the same in several processes
  RAY_ADDRESS=HOST:6379 python evaluate_fid.py gen num_workers=16 ...              the same on a Ray cluster
  python evaluate_fid.py score                                                     compare the two

All three take the same arguments. `sample=KEY` generates one example num_images times.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.cli.config import settings_or_help
from localctl.cli.program import explained, one_sentence
from localctl.evaluation.settings import FidSettings
from localctl.messages import loading

COMMANDS = {"ref": "make_reference", "gen": "generate", "score": "score"}  # -> functions of localctl.evaluation.fid
PROGRAM = "evaluate_fid.py"
ALIASES = {
    "pretrained_model_name_or_path": "base",
    "base.path": "base.name",
    "train_data_dir": "data.path",
    "resolution": "data.resolution",
    "caption_column": "data.caption_column",
    "image_column": "data.image_column",
}
FREE_GROUPS = {"base": "base.name", "data": "data.name"}


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run one of ``COMMANDS``. Returns 0; 2 after a user's error and 1 on a full disk, each printed in one sentence."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in COMMANDS else None
    if command is None and not {"-h", "--help", "--version"} & set(argv):
        word = argv[0] if argv and argv[0].isalpha() else None
        what = f"There is no command {word!r}" if word else "The command is missing"
        raise ValueError(f"{what}; write one of {', '.join(COMMANDS)}, as in `{program} ref`.")
    settings = settings_or_help(
        f"{program} {'|'.join(COMMANDS)}",
        argv,
        FidSettings,
        about=explained(__doc__, program),
        aliases=ALIASES,
        free_groups=FREE_GROUPS,
        name="evaluate_fid",
    )
    if command is None or settings is None:
        return 0
    with loading():
        from localctl.evaluation import fid

    getattr(fid, COMMANDS[command])(settings)
    return 0
