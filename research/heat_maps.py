"""Where each phrase is attended to, before and after each control: one image, one seed, a row per control.

  python -m research.heat_maps --layout scene.json

The first column is the image with the outlines of its regions; the next ones are, for each phrase, the map of its
attention over the cross-attention layers and steps (see ``AttentionMaps``), with the share that lies in its region.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading

if TYPE_CHECKING:  # what loads torch is imported after the flags are read
    from PIL import Image

    from localctl.jobs.variants import Variant

PROGRAM = "research.heat_maps"
_SMALLEST = 192  # px; smaller images are enlarged, so that their labels fit


def new_parser() -> Arguments:
    """Return the flags."""
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--layout", required=True, metavar="FILE", help="a scene (JSON)")
    add("--controls", nargs="+", default=["none", "bias", "dense", "guidance"], help="as sample.py --compare")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the controls")
    add("--base", default="micro", help="micro, sd15, sd21, sdxl, a folder or a hub id")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--num_inference_steps", type=int, default=30, help="sampling steps")
    add("--end", type=float, default=1.0, help="average the maps up to this fraction of the steps")
    add("--output", default="outputs/heat_maps.png", metavar="FILE", help="image file to write")
    return parser


def heat_rows(options: argparse.Namespace, variants: Sequence[Variant]) -> list[list[Image.Image]]:
    """Return one row per variant: the image and a heat map per phrase."""
    from localctl.control.attention_maps import AttentionMaps
    from localctl.drawing import captioned, render_layout
    from localctl.layout_io import load_layout
    from localctl.pipelines import BaseConfig, load_pipeline
    from localctl.sampling import generate
    from research.bases import suits

    layout = load_layout(options.layout)
    pipe, own = load_pipeline(BaseConfig(name=options.base)), replace(suits(options.base), scheduler=None)
    rows = []
    for variant in variants:
        maps = AttentionMaps(end=options.end)
        image = generate(
            pipe,
            layout,
            [*variant.controls, maps],
            options.seed,
            sampling=variant.sampling.over(own),
            num_inference_steps=options.num_inference_steps,
        ).images[0]
        factor = -(-_SMALLEST // image.width)
        image = image.resize((factor * image.width, factor * image.height))
        labeled = [(variant.label, render_layout(layout, image)), *maps.overlays(0, image)]
        rows.append([captioned(image, [label]) for label, image in labeled])
    return rows


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Write the sheet; return 0, or 2 after a user's error, with one sentence on stderr."""
    options = new_parser().read(argv)
    with loading():
        from localctl.drawing import grid
        from localctl.jobs.variants import read_variants

    variants = read_variants(options.controls, options.set, options.base)
    rows = heat_rows(options, variants)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    grid(rows).save(options.output)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
