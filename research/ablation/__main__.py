"""Train and measure every variant of the method on the embedded base, and write what came out.

  python -m research.ablation --report docs/ablation.md            all rows; the same again goes on
  python -m research.ablation --report docs/ablation.md --sweep    and the sweep of the local term
  python -m research.ablation --rows sobel feature_masked --max_train_steps 200

Each training's result is written when it is done, and never made again; a training that was stopped
goes on from its checkpoint. A GPU is used where there is one (ACCELERATE_USE_CPU=true keeps training off it).
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
from research.ablation.rows import BASE, ROWS, Cell, Protocol, Sweep, row_cells, sweep_cells
from research.flags import REPORT_HELP, add_protocol, results_of

PROGRAM = "research.ablation"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    protocol = Protocol()
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--rows", nargs="*", default=list(ROWS), help=f"which, of {', '.join(ROWS)}; none: only the page and the sweep")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training; rows besides the headline take the first")
    add("--max_train_steps", type=int, help="default: that of the experiments")
    add("--train", nargs="+", default=[], metavar="KEY=VALUE", help="other configuration of every training")
    add("--sweep", action="store_true", help="also sweep the local term")
    add("--sweep_weights", nargs="+", type=float, default=[1e-3, 3e-2, 0.3, 1.0], help="of the local term")
    add("--sweep_schedules", nargs="+", choices=SCHEDULES, default=["constant", "snr"], help="w(t) of the local term")
    add("--sweep_normalise", nargs="+", choices=NORMALISE, default=["map", "mask"], help="its means")
    add("--sweep_steps", type=int, default=250, help="of each training of the sweep")
    add("--count", type=int, default=protocol.count, help="held-out scenes")
    add_protocol(parser, protocol)
    add(
        "--report",
        type=Path,
        default=Path("outputs/ablation.md"),
        help=REPORT_HELP,
    )
    add("--work_dir", type=Path, default=Path("outputs/ablation_work"), help="trainings and images")
    return parser.read(argv)


def planned(args: argparse.Namespace) -> list[Cell]:
    """ValueError for rows, seeds or settings of the sweep that make no sense."""
    cells = row_cells(args.rows, args.seeds, args.max_train_steps, args.train)
    if args.sweep:
        sweep = Sweep(args.sweep_weights, args.sweep_schedules, args.sweep_normalise, args.sweep_steps)
        if min(sweep.weights) <= 0:
            raise ValueError("The sweep's weights must be above 0; without the local term it trains once anyway.")
        cells += sweep_cells(sweep, args.seeds[0], args.train)
    return cells


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """0 when done; 2 after a user's error, 1 when the disk is full; 130 or 143 when training was stopped."""
    args = parse(argv)
    folder, cells = results_of(args.report), planned(args)
    with loading():
        from localctl.signals import exit_code
        from research.ablation.report import write_report
        from research.ablation.study import Ablation, Interrupted

    protocol = Protocol(
        base=args.base,
        count=args.count,
        num_inference_steps=args.num_inference_steps,
        extractors=tuple(args.extractor),
        references=args.references,
    )
    study = Ablation(protocol, folder, args.work_dir)
    try:
        study.run([BASE, *cells], lambda: write_report(folder, args.report))
    except Interrupted as stopped:
        return exit_code(stopped.signal)
    print(f"{args.report}: {len(cells)} trainings measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
