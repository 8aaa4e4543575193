"""Measure how much of the possible control an adapter reaches on held-out scenes, and whether it leaks from the mask.

python -m research.control_share --adapter outputs/adapter/adapter
python -m research.control_share --adapter run/checkpoint-500/adapter run/adapter --count 50    # a curve

The mask of each scene is a random box, the condition its edges. Four images are compared: the scene, its round trip
through the VAE (the ceiling), what the base generates from the caption (the floor), and what it generates with the
adapter from the same noise. Control = (F1 adapter - F1 base) / (F1 round trip - F1 base) inside the mask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from localctl.bases import SCHEDULERS
from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading
from research.flags import check_least, make_folder

PROGRAM = "research.control_share"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags. Raises ValueError for values out of range or an output folder that cannot be made."""
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--adapter", nargs="+", required=True, type=Path, metavar="DIR", help="folders of trained LocalAdapters")
    add("--base", help="micro, or a folder, of a U-Net or a transformer; default: what the adapters were trained on")
    add("--count", type=int, default=200, help="held-out scenes")
    add("--num_inference_steps", type=int, default=30, help="sampling steps of each image")
    add("--guidance_scale", type=float, help="default: that of the base")
    add("--unconditional_scale", type=float, help="features beside the empty prompt; default: the adapters' own")
    add("--control_guidance_scale", type=float, help="a guidance scale of the adapters' own; default: none")
    known = ", ".join(SCHEDULERS)
    add("--scheduler", metavar="NAME", help=f"one of {known}; default: ddim, of a flow-matching base euler")
    add("--batch_size", type=int, default=16, help="images generated at once; does not change them")
    add("--seed", type=int, default=0, help="seed of the masks")
    add("--output_dir", type=Path, default=Path("outputs/control"), help="folder of the figures and sheets")
    args = parser.read(argv)
    check_least(args, {"count": 1, "num_inference_steps": 1, "batch_size": 1}, "--")
    if args.scheduler not in (None, *SCHEDULERS):
        raise ValueError(f"Unknown scheduler {args.scheduler!r}; choose one of {', '.join(SCHEDULERS)}.")
    make_folder(args.output_dir)
    return args


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table; return 0, or 2 after a user's error."""
    args = parse(argv)
    with loading():
        from research.control_share.study import run

    print(run(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
