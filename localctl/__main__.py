"""`python -m localctl`: which programs there are. Each explains itself with `--help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.cli.arguments import VERSION
from localctl.cli.program import one_sentence
from localctl.messages import nearest

PROGRAM = "python -m localctl"
PROGRAMS = {
    "Make and use an adapter": {
        "python data/make_dataset.py": "a folder of photos becomes a data set",
        "python data/download_images.py": "a list of addresses becomes a folder of photos",
        "python -m localctl.data": "check a data set as the training reads it",
        "python train_adapter.py": "train a local adapter",
        "python sample.py": "generate images that follow a condition inside a mask, or a layout",
    },
    "Place things": {
        "python -m localctl.layout_predictor": "predict where the objects of a prompt belong",
        "python -m research.layout_predictor.train": "train what predicts it",
        "python -m research.layout_predictor.report": "measure it",
        "python -m research.heat_maps": "where each phrase is attended to, for each control",
    },
    "Measure": {
        "python evaluate_fid.py": "distances of generated images to photos (FID, KID, CMMD)",
        "python evaluate_quantitative_metrics.py": "compare several adapters, or plain folders of images",
        "python -m research.control_share": "edges inside the mask, between base and ceiling",
        "python -m research.ablation": "does each part of the method help",
        "python -m research.layout_benchmark": "do objects stand where a layout asks for them",
        "python -m research.spacetime": "what space-time attention gains",
        "python -m research.metric_sanity": "does a distance see damage",
    },
    "The embedded base": {
        "python -m research.micro_base": "train it",
        "python -m research.micro_base.report": "measure it",
        "python -m research.micro_base.word_use": "does it use the words of a caption",
    },
}


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Print the overview, or with ``--version`` the version; 2 after any other argument."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--version" in argv:
        print(VERSION)
        return 0
    rest = [word for word in argv if word not in ("-h", "--help", "help")]
    if rest:
        known = [command for programs in PROGRAMS.values() for command in programs]
        words = [command.rsplit("/", 1)[-1].rsplit(" ", 1)[-1].removesuffix(".py") for command in known]
        near = nearest(rest[0].removesuffix(".py"), words)
        raise ValueError(f"{rest[0]!r} is no program to start from here; {near}")
    print(f"{VERSION}: local control of text-to-image diffusion. Every program explains itself with --help.")
    for title, programs in PROGRAMS.items():
        print(f"\n{title}")
        for command, text in programs.items():
            print(f"  {command:<46} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
