"""Measure every region method on held-out layouts, or tune their settings on others, and write the page of results.

  python -m research.layout_benchmark --report docs/layout_benchmark.md     every method; run again to resume
  python -m research.layout_benchmark --methods guidance bias+guidance --layouts 20 --seeds 0
  python -m research.layout_benchmark --tune guidance bias                  a grid of settings for each
  python -m research.layout_benchmark --tune guidance --grid guidance.scale=30,100 guidance.end=.2,.5

The result of each method is written as soon as it is measured, and kept; existing images are not generated again.
For each gate that is missed, the command prints where the attention of the method is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localctl.bases import SCHEDULERS
from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading
from research.flags import REPORT_HELP, add_protocol, results_of
from research.layout_benchmark.protocol import METHODS, SINGLE, Protocol

if TYPE_CHECKING:  # what loads torch is imported after the flags are read
    from research.layout_benchmark.figures import Figures
    from research.layout_benchmark.methods import Method

PROGRAM = "research.layout_benchmark"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    protocol = Protocol()
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), help=f"as sample.py --compare; default: {' '.join(METHODS)}")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the controls, in place of the presets'")
    add("--tune", nargs="*", metavar="CONTROL", help=f"tune these controls; without a name: {' '.join(SINGLE)}")
    add("--grid", nargs="+", default=[], metavar="CONTROL.NAME=V,V", help="axes of the grid, over the built-in ones")
    add("--layouts", type=int, help=f"default: {protocol.layouts}; with --tune 24")
    add("--seeds", nargs="+", type=int, default=list(protocol.seeds), help="of the noise, each for every layout")
    add_protocol(parser, protocol, "micro, or the folder of another base of the scenes, of a U-Net or a transformer")
    add(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        help=f"of all methods; default: that of each method's preset, or {protocol.scheduler}; euler for flow",
    )
    add("--guidance_scale", type=float, help="of all methods; default: that of each method's preset, or the base")
    add("--batch_size", type=int, default=16, help="images generated at once; does not change them")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--report", type=Path, help=REPORT_HELP)
    add("--output", "--work_dir", dest="work_dir", type=Path, help="folder of the images and of reference statistics")
    return parser.read(argv)


def protocol_of(args: argparse.Namespace, tune: bool, scheduler: str = Protocol.scheduler) -> Protocol:
    """Return the protocol; tuning uses other layouts than the benchmark, all of two regions.

    ``scheduler``: where the flags give none.

    Raises:
        ValueError: a value is out of range.
    """
    return Protocol(
        base=args.base,
        split="val" if tune else "test",
        layouts=(24 if tune else Protocol.layouts) if args.layouts is None else args.layouts,
        regions=(2,) if tune else Protocol.regions,
        seeds=tuple(args.seeds),
        num_inference_steps=args.num_inference_steps,
        scheduler=args.scheduler or scheduler,
        guidance_scale=args.guidance_scale,
        extractors=tuple(args.extractor),
        references=args.references,
        cost=not tune,
    )


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark or the tuning. Returns 0; 2 after a user's error, 1 if the disk is full."""
    args = parse(argv)
    tune = args.tune is not None
    if args.grid and not tune:
        raise ValueError("--grid sets the axes of --tune; add --tune, or remove --grid.")
    name = "layout_tuning" if tune else "layout_benchmark"
    page = args.report or Path(f"outputs/{name}.md")
    folder = results_of(page)
    with loading():
        from localctl.sampling_settings import Sampling
        from research.bases import suits
        from research.layout_benchmark.figures import read_figures
        from research.layout_benchmark.methods import grids, methods
        from research.layout_benchmark.report import write_report, write_tuning
        from research.layout_benchmark.study import LayoutBenchmark

    fixed = Sampling(args.scheduler, args.guidance_scale)
    if tune:
        chosen = grids(args.tune or SINGLE, args.grid, args.base, fixed)
    else:
        chosen = methods(args.methods, args.set, args.base, fixed)
    work = args.work_dir or Path(f"outputs/{name}_work")
    study = LayoutBenchmark(
        protocol_of(args, tune, suits(args.base).scheduler or Protocol.scheduler),
        folder,
        work,
        args.batch_size,
        args.device,
    )
    write = write_tuning if tune else write_report
    study.run(chosen, lambda: write(folder, page))
    print(page)
    figures = read_figures(folder)
    print_best(figures, chosen, args.base) if tune else print_gates(figures)
    return 0


def print_gates(figures: Figures) -> None:
    """Print every gate, and for a missed one where the attention of the method is."""
    from research.layout_benchmark.figures import gates
    from research.layout_benchmark.report import explain

    for gate in gates(figures):
        print(gate)
        if not gate.met:
            print(explain(figures, gate))


def print_best(figures: Figures, chosen: Sequence[Method], base: str) -> None:
    """Print the best settings of each control, in the form that the presets have."""
    from research.layout_benchmark.figures import ranked
    from research.layout_benchmark.methods import preset_words

    known = {method.name: method for method in chosen}
    best: dict[str, str] = {}
    for name in ranked(figures):
        if name in known and known[name].controls:
            best.setdefault(name.partition(" ")[0], name)
    for control, name in best.items():
        right, plain = figures.mean(name, "right", 2), figures.mean(figures.plain_of(name).name, "right", 2)
        print(f"{control}: right {right} (plain {plain}), Fréchet {figures.frechet(name):.2f} times plain's")
        print(f'  "{control}": {preset_words(known[name], base)},')


if __name__ == "__main__":
    sys.exit(main())
