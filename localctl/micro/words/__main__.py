"""Does the base use the words of a caption? The error of what it predicts, with the right word and with each wrong one;
and what of the text states is told by a word at its own place.

python -m localctl.micro.words                      # the embedded base
python -m localctl.micro.words --base FOLDER        # another micro base, while it is being trained, say
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.run.arguments import Arguments
from localctl.run.messages import loading
from localctl.run.program import one_sentence

PROGRAM = "localctl.micro.words"


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
        from localctl.micro.words.measuring import report

    print(report(args.base, args.count, args.timesteps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
