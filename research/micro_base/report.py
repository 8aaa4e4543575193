"""Measure the embedded base on held-out scenes and write its model card.

python -m research.micro_base.report            # writes localctl/micro/MODEL_CARD.md, its figures and sheets
python -m research.micro_base.report --quick    # a fifth of the images, printed only
python -m research.micro_base.report --base outputs/base --images_only --output_dir outputs/report --device cuda
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from localctl.bases import MICRO_WEIGHTS
from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading

PROGRAM = "research.micro_base.report"


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Measure the base; return 0, or 2 after a user's error."""
    parser = Arguments(PROGRAM, "Measure the embedded base.")
    parser.add_argument(
        "--base",
        default="micro",
        help="micro, or the folder of another base of the scenes, of a U-Net or a transformer",
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the images; print only")
    parser.add_argument(
        "--images_only",
        action="store_true",
        help="only figures of generated images, and no card",
    )
    parser.add_argument("--guidance_scale", type=float, help="default: that of the embedded base")
    parser.add_argument("--output_dir", type=Path, default=MICRO_WEIGHTS.parent, help="folder to write the card to")
    parser.add_argument("--device", default="cpu", help="device to generate on: cpu, cuda or auto")
    args = parser.read(argv)
    if args.images_only and not args.quick and args.output_dir == MICRO_WEIGHTS.parent:
        raise ValueError("--images_only would replace the shipped base's figures by a part of them; give --output_dir.")
    if args.guidance_scale is not None and not (args.images_only or args.quick):
        raise ValueError("--guidance_scale is not that of the card; add --images_only, or leave it out.")
    with loading():
        from research.micro_base.measure import GUIDANCE, run

    guidance = GUIDANCE if args.guidance_scale is None else args.guidance_scale
    run(args.base, args.quick, args.images_only, args.output_dir, args.device, guidance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
