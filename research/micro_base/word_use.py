"""Measure whether a base uses the words of a caption: the error of its prediction with the right and each wrong word.

Also measured is how much of the text states at a word's position depends on this word.

python -m research.micro_base.word_use                      # the embedded base
python -m research.micro_base.word_use --base FOLDER        # another micro base, as one in training
python -m research.micro_base.word_use --relations --count 60 --timesteps 950 800 700      # left, right, above, below
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading

PROGRAM = "research.micro_base.word_use"


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; return 0, or 2 after a user's error."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--base", default="micro", help="micro, or the folder of another micro base")
    parser.add_argument("--count", type=int, default=100, help="scenes to measure")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[300, 400, 500], help="from 0 to 999")
    parser.add_argument("--relations", action="store_true", help="measure the relation of two objects instead")
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="of the images with a relation; default: 2")
    args = parser.read(argv)
    if args.guidance_scale and not args.relations:
        raise ValueError("--guidance_scale acts on the images of --relations; add that, or leave it out.")
    if args.count < 1 or not all(0 <= t < 1000 for t in args.timesteps):
        raise ValueError("--count must be at least 1, and --timesteps between 0 and 999.")
    if args.relations:
        with loading():
            from research.micro_base.relations import GUIDANCE, lines

        for line in lines(args.base, args.count, args.timesteps, args.guidance_scale or [GUIDANCE]):
            print(line, flush=True)
        return 0
    with loading():
        from research.micro_base.word_errors import report

    print(report(args.base, args.count, args.timesteps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
