"""Measure what space-time attention gains, from text alone, on held-out captions that state a relation.

  python -m research.spacetime --count 200 --optimised 40 --layout true
  python -m research.spacetime --set constant.weight=0.7 optimised.epochs=10

Each caption's image is generated in four ways from the same noise: plain, and with space-time attention whose weights
are constant, scheduled (a linear fade), or optimised for the image (the first --optimised captions alone: it is slow).
The reader of micro scenes detects whether the objects are there, in their colours, and in the stated relation. The
weights are optimised for the CLIP that also computes the CLIP score, not for the other figures.

Layouts: ``true``, the boxes of the caption's scene; ``auto``, predicted from the caption. Writes images, weights,
results.json, report.md and sheet.png into --output_dir; run the command again to resume. --against results.json of
another run compares its rows with those of this one, caption by caption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from localctl.bases import SCHEDULERS
from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading
from research.spacetime import LAYOUTS, ROWS

PROGRAM = "research.spacetime"


def new_parser() -> Arguments:
    """Return the flags."""
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--count", type=int, default=200, help="held-out captions")
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="which to generate; default: all")
    add("--optimised", type=int, default=40, help="number of captions to optimise weights for")
    add("--layout", choices=LAYOUTS, default="true", help="where the boxes come from")
    add("--layout_predictor", help="folder of the predictor for --layout auto; default: the shipped one")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="ROW.NAME=VALUE",
        help="settings of a row's control; without ROW, of all rows",
    )
    add("--base", default="micro", help="micro, or the folder of another micro base")
    add("--num_inference_steps", type=int, default=30, help="sampling steps of each image")
    add("--guidance_scale", type=float, help="default: the one preset for the controls on the base")
    add("--scheduler", default="ddim", choices=sorted(SCHEDULERS), help="of all rows")
    add("--batch_size", type=int, default=16, help="images generated at once; does not change them")
    add("--device", default="cpu", help="auto, cpu, cuda, ...")
    add("--against", type=Path, metavar="RESULTS.JSON", help="of other settings; the report has the differences to it")
    add("--output_dir", type=Path, default=Path("outputs/spacetime"), help="folder of all output")
    return parser


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and print its report. Returns 0; 2 after a user's error, 1 if the disk is full."""
    options = new_parser().read(argv)
    with loading():
        from research.spacetime.study import check, run

    check(options)
    print(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
