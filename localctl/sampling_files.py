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
from localctl.layout import Layout
from localctl.layout_io import load_layout, save_layout
from localctl.sampling import GenerateOutput
from localctl.sampling_regions import AUTO, Variant, named
from localctl.sampling_sheets import axis_labels, region_sheet

RECORD = "sample.json"
INPUTS = ("image", "condition_image", "mask", "layout")  # flags that name files; copied beside the record


def open_output(path: str) -> Path:
    """Make the output folder, before anything slow. ValueError when that is not possible."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be made ({error.strerror}); choose another.") from error
    return folder


def save(
    outputs: Sequence[tuple[Variant, GenerateOutput]],
    options: Mapping[str, Any],
    conditions: Sequence[Tensor],
    masks: Sequence[Tensor],
    folder: Path,
    read: bool = False,
) -> list[Path]:
    """Write the pictures, ``sheet.png``, copies of the inputs and the record; returns the paths of the pictures.

    ``options`` are the flags that repeat the run, with the files named in ``INPUTS`` where they are now. ``read``: put
    the reader's verdict under pictures with regions, which makes sense for micro scenes.
    """
    paths = []
    for variant, output in outputs:
        ending = f"_{named(variant.label)}" if len(outputs) > 1 else ""
        for name, image in zip(_names(output), output.images, strict=True):
            paths.append(folder / f"{name}{ending}.png")
            image.save(paths[-1])
    first = outputs[0][1]
    if not options["layout"]:
        contact_sheet(first, conditions, masks).save(folder / "sheet.png")
    elif len(outputs) == 1:
        _layouts_sheet(first, read).save(folder / "sheet.png")
    elif options["sweep"]:
        for index, name in enumerate(_names(first)):
            _sweep_sheet(outputs, index, read).save(folder / f"{name}_sweep.png")
    else:
        rows = [[output.images[i] for _, output in outputs] for i in range(len(first.images))]
        columns = [variant.label for variant, _ in outputs]
        region_sheet(rows, first.layouts, columns, _captions(first), read).save(folder / "compare.png")
    options = {**options, **_copy_inputs(options, first.layouts, folder)}
    record = {"localctl": __version__, "options": options, "images": [path.name for path in paths]}
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def _names(output: GenerateOutput) -> list[str]:
    """The beginning of each picture's file name."""
    count = len(dict.fromkeys(output.seeds))
    return [f"{i // count:02d}_seed{seed}" for i, seed in enumerate(output.seeds)]


def _captions(output: GenerateOutput) -> list[str]:
    return [f"seed {seed}: {layout.prompt}" for seed, layout in zip(output.seeds, output.layouts, strict=True)]


def _layouts_sheet(output: GenerateOutput, read: bool) -> Image.Image:
    """One row per layout, one column per seed."""
    seeds = list(dict.fromkeys(output.seeds))
    starts = range(0, len(output.images), len(seeds))
    rows, layouts = [output.images[i : i + len(seeds)] for i in starts], [output.layouts[i] for i in starts]
    labels = [f"seed {seed}" for seed in seeds]
    return region_sheet(rows, layouts, labels, [layout.prompt for layout in layouts], read)


def _sweep_sheet(outputs: Sequence[tuple[Variant, GenerateOutput]], index: int, read: bool) -> Image.Image:
    """The grid of one picture: columns and rows are the values of the settings."""
    cells = {(variant.column, variant.row): output.images[index] for variant, output in outputs}
    columns, captions = axis_labels({(variant.column, variant.row): variant.label for variant, _ in outputs})
    rows = [[cells[column, row] for column in range(len(columns))] for row in range(max(1, len(captions)))]
    layout = outputs[0][1].layouts[index]
    captions = captions or [_captions(outputs[0][1])[index]]
    return region_sheet(rows, [layout] * len(rows), columns, captions, read)


def _copy_inputs(options: Mapping[str, Any], drawn: Sequence[Layout], folder: Path) -> dict[str, Any]:
    """Copy the input files to ``folder``/inputs, so that the record needs no others; their names relative to it.

    Predicted layouts are written down as they were ``drawn``: a later predictor changes no recorded run.
    """
    contents = {
        f"inputs/{name}_{index}{Path(path).suffix.lower()}": (name, Path(path).read_bytes())
        for name in INPUTS
        if name != "layout"
        for index, path in enumerate(options[name] or [])
    }  # all read before any is written: a repeated run may read from the folder it writes to
    predicted = options["layout"] == [AUTO]
    layouts = list(dict.fromkeys(drawn)) if predicted else [load_layout(path) for path in options["layout"] or ()]
    (folder / "inputs").mkdir(exist_ok=True)
    copies: dict[str, Any] = {"prompt": None, "layout_seed": None} if predicted else {}
    for index, layout in enumerate(layouts):
        path = save_layout(layout, folder / "inputs" / f"layout_{index}.json")  # with its masks
        copies.setdefault("layout", []).append(str(path.relative_to(folder)))
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
