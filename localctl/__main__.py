"""`localctl COMMAND`, also `python -m localctl`: all programs as commands; `--help` explains each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from localctl.cli.arguments import VERSION
from localctl.cli.program import CONSOLE, SCRIPTS, one_sentence
from localctl.messages import nearest

# Command -> the module of its main(argv, program), and its purpose.
COMMANDS = {
    "train": ("localctl.cli.train", "train a local adapter"),
    "cache": ("localctl.cli.cache", "encode the images and captions of a dataset once, for any number of trainings"),
    "sample": ("localctl.cli.sample", "generate images that follow a condition inside a mask, or a layout"),
    "studio": ("localctl.cli.studio", "open a web page: paint regions and masks, and generate images"),
    "evaluate fid": ("localctl.cli.evaluate_fid", "measure generated images against photos (FID, KID, CMMD)"),
    "evaluate metrics": ("localctl.cli.evaluate_metrics", "compare several adapters, or plain folders of images"),
    "check-data": ("localctl.cli.check_data", "check a dataset as training reads it"),
    "export": ("localctl.cli.bridges", "write an adapter or a layout for another program"),
    "import": ("localctl.cli.bridges", "read an adapter or a layout of another program"),
    "predict-layout": ("localctl.cli.predict_layout", "predict a layout from a prompt"),
}
# In a checkout: scripts that are the same as a command, and programs that are not installed.
PROGRAMS = {
    "The commands as scripts": SCRIPTS,
    "Data": {
        "python data/make_dataset.py": "make a dataset from a folder of photos",
        "python data/download_images.py": "download a list of photos into a folder",
        "python data/convert.py": "convert webdataset tars or a hub dataset to parquet files",
    },
    "Studies": {
        "python -m research.layout_predictor.train": "train the layout predictor",
        "python -m research.layout_predictor.report": "measure the layout predictor",
        "python -m research.heat_maps": "plot where each phrase is attended to, for each control",
        "python -m research.control_share": "measure edges inside the mask, between base and ceiling",
        "python -m research.ablation": "measure what each part of the method contributes",
        "python -m research.layout_benchmark": "measure whether objects are where a layout asks for them",
        "python -m research.spacetime": "measure what space-time attention gains",
        "python -m research.metric_sanity": "test whether a distance detects damaged images",
        "python -m research.example_lora": "train the example LoRA",
        "python -m research.studio_tour": "render the images of the studio's page",
        "python -m research.micro_base": "train the embedded base",
        "python -m research.micro_base.report": "measure the embedded base",
        "python -m research.micro_base.word_use": "test whether it uses the words of a caption",
    },
}


@one_sentence(CONSOLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (None: the command line) begins with, or print the list of commands.

    Returns the exit code of the command; 2 with one sentence on stderr for an unknown command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for count in (1, 2):
        command = " ".join(words[:count])
        if command in COMMANDS:
            main = importlib.import_module(COMMANDS[command][0]).main
            return int(main(words[count:], program=f"{CONSOLE} {command}"))
    if "--version" in words:
        print(VERSION)
        return 0
    unknown = [word for word in words if word not in ("-h", "--help", "help")]
    if unknown == ["evaluate"] and len(words) > 1:
        _table({command: text for command, (_, text) in COMMANDS.items() if command.startswith("evaluate ")})
        return 0
    if unknown:
        _refuse(unknown)
    print(f"{VERSION}: local control of text-to-image diffusion.\n\nusage: {CONSOLE} COMMAND ...\n")
    _table({command: text for command, (_, text) in COMMANDS.items()})
    print(f"\n{CONSOLE} COMMAND --help explains a command; --version prints the version.")
    for title, programs in PROGRAMS.items():
        print(f"\n{title}, in a checkout")
        _table(programs)
    return 0


def _table(lines: dict[str, str]) -> None:
    for name, text in lines.items():
        print(f"  {name:<42} {text}")


def _refuse(words: Sequence[str]) -> None:
    """Raise a ValueError for an unknown command which names the nearest one."""
    if words[0] == "evaluate":
        second = f" {words[1]!r}" if len(words) > 1 else ""
        raise ValueError(f"Name what to evaluate, fid or metrics{second and f', not{second}'}; see --help.")
    scripts = {name.rsplit("/", 1)[-1].rsplit(" ", 1)[-1]: name for part in PROGRAMS.values() for name in part}
    word = words[0].removesuffix(".py").replace("_", "-")
    known = [*{command.partition(" ")[0] for command in COMMANDS}, *(name.removesuffix(".py") for name in scripts)]
    raise ValueError(f"There is no command {words[0]!r}; {nearest(word, sorted(known))}")


if __name__ == "__main__":
    sys.exit(main())
