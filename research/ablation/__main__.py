"""Train and measure every variant of the method on the embedded base, and write the page of results.

  python -m research.ablation --report docs/ablation.md            all rows; run again to resume
  python -m research.ablation --report docs/ablation.md --sweep    also sweep the local term
  python -m research.ablation --part val --count 60 --guidance examples/adapter --rows --report docs/ablation_choices.md
  python -m research.ablation --rows sobel feature_masked --max_train_steps 200

The result of each training is written as soon as it is measured, and kept; a training that was stopped
resumes from its checkpoint. A GPU is used where there is one (ACCELERATE_USE_CPU=true keeps training off it).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading
from localctl.settings import NORMALISE, SCHEDULES
from research.ablation.rows import BASE, ROWS, Cell, Protocol, Sweep, guidance_cells, row_cells, sweep_cells
from research.flags import REPORT_HELP, add_protocol, results_of

PROGRAM = "research.ablation"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    protocol = Protocol()
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}; no name: only the page and the sweep")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training; only headline rows use all, others one")
    add("--max_train_steps", type=int, help="default: as in the experiments")
    add("--train", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every training's settings")
    add("--sweep", action="store_true", help="also sweep the local term")
    add("--sweep_weights", nargs="+", type=float, default=[1e-3, 3e-2, 0.3, 1.0], help="weights of the local term")
    add("--sweep_schedules", nargs="+", choices=SCHEDULES, default=["constant", "snr"], help="w(t) of the local term")
    add("--sweep_normalise", nargs="+", choices=NORMALISE, default=["map", "mask"], help="loss.normalise")
    add("--sweep_steps", type=int, default=250, help="steps of each training of the sweep")
    add("--guidance", metavar="DIR", help="also sample this adapter with several ways of guidance")
    add("--part", choices=("val", "test"), help="of the scenes: val for choices, test (default) for claims")
    add("--count", type=int, default=protocol.count, help="held-out scenes")
    add_protocol(parser, protocol)
    add("--report", type=Path, default=Path("outputs/ablation.md"), help=REPORT_HELP)
    add("--work_dir", type=Path, default=Path("outputs/ablation_work"), help="trainings and images")
    return parser.read(argv)


def planned(args: argparse.Namespace) -> list[Cell]:
    """Return the trainings asked for. Raises ValueError for unknown rows, repeated seeds or weights out of range."""
    cells = row_cells(args.rows, args.seeds, args.max_train_steps, args.train)
    if args.sweep:
        sweep = Sweep(args.sweep_weights, args.sweep_schedules, args.sweep_normalise, args.sweep_steps)
        if min(sweep.weights) <= 0:
            raise ValueError("--sweep_weights must be above 0; the sweep trains without the local term anyway.")
        cells += sweep_cells(sweep, args.seeds[0], args.train)
    return cells if args.guidance is None else [*guidance_cells(args.guidance), *cells]


def protocol_of(args: argparse.Namespace) -> Protocol:
    """Return how everything is measured."""
    return Protocol(
        base=args.base,
        part=args.part,
        count=args.count,
        num_inference_steps=args.num_inference_steps,
        extractors=tuple(args.extractor),
        references=args.references,
    )


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the study. Returns 0; 2 after a user's error, 1 if the disk is full, 130 or 143 if a signal stopped it."""
    args = parse(argv)
    folder, cells = results_of(args.report), planned(args)
    with loading():
        from localctl.signals import exit_code
        from research.ablation.report import write_report
        from research.ablation.study import Ablation, Interrupted

    study = Ablation(protocol_of(args), folder, args.work_dir)
    try:
        study.run([BASE, *cells], lambda: write_report(folder, args.report))
    except Interrupted as stopped:
        return exit_code(stopped.signal)
    print(f"{args.report}: {len(cells)} trainings measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
