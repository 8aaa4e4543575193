"""Train the embedded base on procedural scenes; every part resumes from its last checkpoint.

python -m research.micro_base --workdir outputs/micro                 # all parts, then export
python -m research.micro_base --parts unet export --minutes 60        # train the U-Net for another hour
python -m research.micro_base --continue_from localctl/micro/weights --parts unet export      # from shipped weights
python -m research.micro_base --continue_from localctl/micro/weights --parts unet export --device cuda --bf16 \
    --unet_minutes 4 --scenes 60000 --unet_scenes 60000 --unet_batch 256                       # minutes on a GPU
python -m research.micro_base --denoiser transformer --continue_from localctl/micro/weights --parts unet export \
    --workdir outputs/micro_dit --output_dir outputs/micro_dit/base                    # SD3's transformer in its place
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
PARTS = ("vae", "clip", "words", "roles", "unet", "decoder", "clip_vision", "export")
DEFAULT_PARTS = tuple(part for part in PARTS if part != "roles")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("outputs/micro"), help="caches and checkpoints")
    add("--output_dir", type=Path, default=MICRO_WEIGHTS, help="folder to write the finished base to")
    add("--parts", nargs="+", choices=PARTS, default=list(DEFAULT_PARTS), help="parts to train or export")
    add(
        "--denoiser",
        choices=("unet", "transformer"),
        default="unet",
        help="what the part `unet` trains and `export` writes: the U-Net, or a transformer of SD3's class by flow "
        "matching; the flags --unet_* are for either",
    )
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
    add(
        "--roles_steps",
        type=int,
        default=1000,
        help="steps of the part roles, a copy of the text tower that tells the sides of related objects",
    )
    add("--decoder_steps", type=int, default=900, help="steps of the decoder alone, on the cached latents")
    add(
        "--clip_vision_steps",
        type=int,
        default=500,
        help="steps of the vision tower, and of the text tower where the U-Net has a text encoder of its own",
    )
    _add_unet(parser)
    add("--bf16", action="store_true", help="compute the denoiser in bfloat16")
    add("--device", default="cpu", help="device for encoding and the U-Net: cpu, cuda or auto; other parts use the CPU")
    add("--continue_from", type=Path, help="exported base to start from, for parts without a checkpoint in --workdir")
    add("--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction", help="output of the U-Net")
    args = parser.read(argv)
    _check(args, parser)
    return args


def _add_unet(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the denoiser."""
    add = parser.add_argument
    add("--unet_scenes", type=int, default=20000, help="scenes whose latents are cached")
    add("--unet_steps", type=int, default=20000, help="steps of the U-Net")
    add("--unet_batch", type=int, default=24, help="scenes per step of the U-Net")
    add("--unet_lr", type=float, default=6e-4, help="highest learning rate of the U-Net")
    add("--unet_init", type=Path, help="checkpoint or .safetensors to start a new U-Net from")
    add(
        "--unet_minutes",
        type=float,
        default=0,
        help="end the U-Net's training so many minutes after the start of the command, rendering included; the "
        "learning rate follows the clock (0 = train for --unet_steps)",
    )
    add(
        "--unet_mix",
        type=float,
        nargs=3,
        default=[0.40, 0.35, 0.0],
        metavar=("ONE", "TWO", "THREE"),
        help="share of scenes with 1, 2 and 3 objects and a full caption; the rest are any scenes",
    )
    add(
        "--unet_relations",
        type=float,
        default=0,
        help="share of scenes with a stated relation, beside those of --unet_mix; above 0, the first object's places "
        "also learn to attend to the relation's word, at all timesteps",
    )
    add(
        "--unet_prefer",
        type=float,
        default=0,
        help="weight of the preference of each scene over a wrong image with the same caption: an object twice, two "
        "colours swapped, one colour or shape changed; 0 = none",
    )
    add("--unet_noisy", type=float, default=0.22, help="share of timesteps from 700 on, where objects are placed")
    add(
        "--patch",
        type=int,
        choices=(1, 2),
        default=1,
        help="side of the transformer's tokens in latents of 8 px; 2 takes a third of the time, and sees less detail",
    )
    add(
        "--teacher",
        type=Path,
        help="base whose U-Net gives the transformer's targets, in place of single scenes; less noisy ones",
    )


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise a ValueError for flags that cannot be followed."""
    shares = [*args.unet_mix, args.unet_relations]
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(
            f"--unet_mix {args.unet_mix} and --unet_relations {args.unet_relations:g} must be shares from 0 to 1 that "
            "add up to at most 1."
        )
    if not 0 < args.unet_noisy < 0.9:
        raise ValueError(f"--unet_noisy {args.unet_noisy:g} must be between 0 and 0.9.")
    if not 0 <= args.unet_prefer < float("inf"):
        raise ValueError(f"--unet_prefer {args.unet_prefer:g} must be 0 or more.")
    if args.unet_prefer and args.unet_relations:
        raise ValueError("--unet_prefer does not go together with --unet_relations, whose targets are means of scenes.")
    if args.unet_prefer and args.continue_from is None and args.unet_init is None:
        raise ValueError("--unet_prefer needs weights to start from and to compare with; give --continue_from.")
    if args.denoiser == "transformer" and args.output_dir == MICRO_WEIGHTS:
        raise ValueError("--denoiser transformer would replace the shipped U-Net's base; give --output_dir.")
    if args.denoiser == "transformer" and "roles" in args.parts:
        raise ValueError("--parts roles does not act on --denoiser transformer; leave it out, or train the U-Net.")
    of_unet = ("prediction_type", "unet_noisy", "unet_relations", "unet_prefer")
    for name in ("patch", "teacher") if args.denoiser == "unet" else of_unet:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name} does not act on --denoiser {args.denoiser}; leave it out, or change that.")
    if args.teacher is not None and not (args.teacher / "unet").is_dir():
        raise ValueError(f"There is no folder {args.teacher / 'unet'}; give --teacher a base with a U-Net.")
    if args.unet_init is not None and not args.unet_init.is_file():
        raise ValueError(f"There is no file {args.unet_init} for --unet_init.")


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
