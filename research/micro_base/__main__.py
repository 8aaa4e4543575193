"""Train the embedded base on procedural scenes; every part resumes from its last checkpoint.

python -m research.micro_base --workdir outputs/micro                 # all parts, then export
python -m research.micro_base --parts unet export --minutes 60        # train the U-Net for another hour
python -m research.micro_base --continue_from localctl/micro/weights --parts unet export      # from shipped weights
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from localctl.bases import MICRO_WEIGHTS
from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading

PROGRAM = "research.micro_base"
PARTS = ("vae", "clip", "words", "unet", "decoder", "clip_vision", "export")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("outputs/micro"), help="caches and checkpoints")
    add("--output_dir", type=Path, default=MICRO_WEIGHTS, help="folder to write the finished base to")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to train or export")
    add(
        "--minutes", type=float, default=0, help="stop each part after so many minutes (0 = never); run again to resume"
    )
    add("--threads", type=int, default=0, help="CPU threads (0 = all)")
    add("--scenes", type=int, default=30000, help="scenes for VAE and CLIP")
    add("--vae_steps", type=int, default=1850, help="steps of the whole VAE")
    add("--clip_steps", type=int, default=950, help="steps of both towers")
    add(
        "--words_steps", type=int, default=1500, help="steps of the text tower alone, towards a direction for each word"
    )
    add("--decoder_steps", type=int, default=900, help="steps of the decoder alone, on the cached latents")
    add("--clip_vision_steps", type=int, default=500, help="steps of the vision tower alone")
    add("--unet_scenes", type=int, default=20000, help="scenes whose latents are cached")
    add("--unet_steps", type=int, default=20000, help="steps of the U-Net")
    add("--unet_batch", type=int, default=24, help="scenes per step of the U-Net")
    add("--unet_init", type=Path, help="checkpoint to start a new U-Net from")
    add("--continue_from", type=Path, help="exported base to start from, for parts without a checkpoint in --workdir")
    add("--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction", help="output of the U-Net")
    return parser.read(argv)


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Train and export the parts; return 0, or 2 after a user's error."""
    args = parse(argv)
    with loading():
        from research.micro_base.parts import build

    build(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
