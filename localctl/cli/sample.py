"""Generate images from a prompt that follow a condition inside a mask, or a layout of regions.

  python sample.py --prompt "a red circle"
  python sample.py --prompt "a red circle" --image photo.png --mask mask.png --adapter runs/canny
  python sample.py --prompt "a red circle" --condition_image edges.png --adapter runs/canny --seeds 1 2 3
  python sample.py --layout scene.json --control bias guidance --set strength=0.6
  python sample.py --layout scene.json --sweep strength=0,.3,.6 outside_strength=0,.2
  python sample.py --layout scene.json --compare all
  python sample.py --layout scene.json --control spacetime_optimized --set epochs=5 --num_inference_steps 20
  python sample.py --layout auto --prompt "a red circle to the left of a blue star" --control guidance
  python sample.py --from_json outputs/sample/sample.json --output_dir outputs/again

Writes one PNG per prompt and seed (and variant), sheet.png, compare.png or a sweep's grids with all of them, and
sample.json, which repeats the run. Images and masks of any size are brought to the size of the run (see "size"). With
several adapters, every adapter flag takes one value for all or one for each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from localctl.cli.program import explained, one_sentence
from localctl.cli.sample_flags import parse
from localctl.messages import loading, log_to_screen

PROGRAM = "sample.py"


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run with these flags; 0 when done, 2 with one sentence on stderr when something in them cannot work."""
    options = parse(sys.argv[1:] if argv is None else argv, explained(__doc__, program), program)
    with loading():
        from localctl.cli.sample_run import run

    with log_to_screen(partial(_print_message, program)):
        for path in run(options):
            print(path, flush=True)
    return 0


def _print_message(program: str, text: str) -> None:
    """Print a message on stderr; standard output is for the paths alone."""
    print(f"{program}: {text}", file=sys.stderr, flush=True)
