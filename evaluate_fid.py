"""How far drawn pictures are from photos: Fréchet distance (FID with Inception), KID, CMMD, CLIP score.

  python evaluate_fid.py ref   data=imagefolder data.path=PHOTOS extractor=fid     statistics of the photos, once
  python evaluate_fid.py gen   adapter=outputs/adapter prompts=both                draws; repeat it after a stop
  torchrun --nproc_per_node 2 evaluate_fid.py gen ...                              with several processes
  python evaluate_fid.py score                                                     compares the two

All three take the same arguments. `sample=KEY` draws one example num_images times.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.evaluation.fid import draw, make_reference, score
from localctl.evaluation.settings import FidSettings
from localctl.run.config import help_text, load_config
from localctl.run.program import one_sentence

COMMANDS = {"ref": make_reference, "gen": draw, "score": score}
ALIASES = {
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "data.path",
    "resolution": "data.resolution",
    "caption_column": "data.caption_column",
    "image_column": "data.image_column",
}
FREE_GROUPS = {"base": "base.name", "data": "data.name"}


@one_sentence("evaluate_fid.py")
def main(argv: Sequence[str] | None = None) -> int:
    """0 when done; 2 after a mistake of the user's, named in one sentence; 1 when the disk is full."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        defaults = load_config([], FidSettings, name="evaluate_fid", aliases=ALIASES)
        print(__doc__)
        print(help_text("evaluate_fid.py ref|gen|score", defaults, aliases=ALIASES, name="evaluate_fid"))
        return 0
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"Say what to do, one of {', '.join(COMMANDS)}, as in `evaluate_fid.py ref`; see --help.")
    settings = load_config(argv[1:], FidSettings, name="evaluate_fid", aliases=ALIASES, free_groups=FREE_GROUPS)
    COMMANDS[argv[0]](settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
