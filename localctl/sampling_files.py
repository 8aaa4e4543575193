"""What a run of ``sample.py`` leaves behind: pictures, a contact sheet, and a record that repeats it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from localctl import __version__
from localctl.images import condition_to_pil, grid, outline
from localctl.sampling import GenerateOutput

RECORD = "sample.json"
INPUTS = ("image", "condition_image", "mask")  # flags that name files; copied beside the record


def open_output(path: str) -> Path:
    """Make the output folder, before anything slow. ValueError when that is not possible."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be made ({error.strerror}); choose another.") from error
    return folder


def save(
    output: GenerateOutput,
    options: Mapping[str, Any],
    conditions: Sequence[Tensor],
    masks: Sequence[Tensor],
    folder: Path,
) -> list[Path]:
    """Write the pictures, ``sheet.png``, copies of the inputs and the record; returns the paths of the pictures.

    ``options`` are the flags that repeat the run, with the files named in ``INPUTS`` where they are now.
    """
    seeds = list(dict.fromkeys(output.seeds))
    paths = [folder / f"{i // len(seeds):02d}_seed{seed}.png" for i, seed in enumerate(output.seeds)]
    for path, image in zip(paths, output.images, strict=True):
        image.save(path)
    contact_sheet(output, conditions, masks).save(folder / "sheet.png")
    options = {**options, **_copy_inputs(options, folder)}
    record = {"localctl": __version__, "options": options, "images": [path.name for path in paths]}
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def _copy_inputs(options: Mapping[str, Any], folder: Path) -> dict[str, list[str]]:
    """Copy the input files to ``folder``/inputs, so that the record needs no others; their names relative to it."""
    contents = {
        f"inputs/{name}_{index}{Path(path).suffix.lower()}": (name, Path(path).read_bytes())
        for name in INPUTS
        for index, path in enumerate(options[name] or [])
    }  # all read before any is written: a repeated run may read from the folder it writes to
    (folder / "inputs").mkdir(exist_ok=True)
    copies: dict[str, list[str]] = {}
    for target, (name, content) in contents.items():
        (folder / target).write_bytes(content)
        copies.setdefault(name, []).append(target)
    return copies


def contact_sheet(output: GenerateOutput, conditions: Sequence[Tensor], masks: Sequence[Tensor]) -> Image.Image:
    """One row per prompt: every condition with the outline of its mask, then the pictures."""
    shown = [outline(condition_to_pil(condition), mask) for condition, mask in zip(conditions, masks, strict=True)]
    seeds = list(dict.fromkeys(output.seeds))
    starts = range(0, len(output.images), len(seeds))
    rows = [[*shown, *output.images[i : i + len(seeds)]] for i in starts]
    labels = ["condition"] * len(shown) + [f"seed {seed}" for seed in seeds]
    return grid(rows, labels, [output.layouts[i].prompt for i in starts])
