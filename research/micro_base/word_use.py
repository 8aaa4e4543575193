"""Does the base use the words of a caption? The error of what it predicts, with the right word and with each wrong one;
and what of the text states is told by a word at its own place.

python -m research.micro_base.word_use                      # the embedded base
python -m research.micro_base.word_use --base FOLDER        # another micro base, while it is being trained, say
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
    """0 when done, 2 with one sentence for a base that cannot be loaded or numbers that make no sense."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--base", default="micro", help="micro, or the folder of another micro base")
    parser.add_argument("--count", type=int, default=100, help="scenes")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[300, 400, 500], help="of 1000")
    args = parser.read(argv)
    if args.count < 1 or not all(0 <= t < 1000 for t in args.timesteps):
        raise ValueError("--count must be at least 1, and --timesteps between 0 and 999.")
    with loading():
        from research.micro_base.word_errors import report

    print(report(args.base, args.count, args.timesteps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
