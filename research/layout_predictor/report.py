"""Measure a layout predictor on held-out micro scenes: relations, overlaps, likelihood.

  python -m research.layout_predictor.report --output report.json
  python -m research.layout_predictor.report --sentences test

Every layout is predicted from the words alone. Intervals are 95 %, bootstrapped over sentences.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading

PROGRAM = "research.layout_predictor.report"


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures. Returns 0; 2 after a user's error, 1 if --output cannot be written."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--predictor", metavar="DIR", help="folder of the predictor; default: the shipped one")
    parser.add_argument("--count", type=int, default=1000, help="sentences per set")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sentences and of the sampled layouts")
    parser.add_argument("--sentences", nargs="+", metavar="FILE", help="measure these instead; test = the frozen 500")
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    options = parser.read(argv)
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, not {options.count}.")
    if options.sentences and options.output:
        raise ValueError("--output is for the scenes' sentences; leave --sentences out, or redirect the printed table.")
    with loading():
        from localctl.layout_predictor.model import load_predictor
        from research.layout_predictor.measure import as_text, measure
        from research.layout_predictor.sentences import FOLDER, read_sentences, sentence_table

    for name in options.sentences or ():
        path = FOLDER / "test.txt" if name == "test" else Path(name)
        print(f"{name}\n\n{sentence_table(load_predictor(options.predictor), read_sentences(path))}\n")
    if options.sentences:
        return 0
    result = measure(load_predictor(options.predictor), options.count, options.seed)
    print(as_text(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
