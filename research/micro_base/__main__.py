"""Train the embedded base on procedural scenes; every part resumes where it stopped.

python -m research.micro_base --workdir outputs/micro                 # all parts, then export
python -m research.micro_base --parts unet export --minutes 60        # one more stretch of the U-Net
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
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("outputs/micro"), help="caches and checkpoints")
    add("--output_dir", type=Path, default=MICRO_WEIGHTS, help="where the finished base is written")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which")
    add("--minutes", type=float, default=0, help="stop each part after so long; run again to go on")
    add("--threads", type=int, default=0, help="CPU threads (0 = all)")
    add("--scenes", type=int, default=30000, help="of VAE and CLIP")
    add("--vae_steps", type=int, default=1850, help="encoder and decoder")
    add("--clip_steps", type=int, default=950, help="both towers")
    add("--words_steps", type=int, default=1500, help="text tower alone: each word at its own place")
    add("--decoder_steps", type=int, default=900, help="decoder alone, on the U-Net's latents")
    add("--clip_vision_steps", type=int, default=500, help="vision tower alone")
    add("--unet_scenes", type=int, default=20000, help="scenes whose latents are cached")
    add("--unet_steps", type=int, default=20000, help="of the U-Net")
    add("--unet_batch", type=int, default=24, help="scenes of a step of the U-Net")
    add("--unet_init", type=Path, help="checkpoint that a new U-Net starts from")
    add("--continue_from", type=Path, help="exported base to start from where workdir has no checkpoint of a part")
    add("--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction", help="of the U-Net")
    return parser.read(argv)


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 after a mistake in the flags."""
    args = parse(argv)
    with loading():
        from research.micro_base.parts import build

    build(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
