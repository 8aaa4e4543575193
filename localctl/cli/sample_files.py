"""What a run of ``sample.py`` leaves behind: pictures, a contact sheet, and a record that repeats it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from localctl import __version__
from localctl.cli.sample_record import AUTO, INPUTS, RECORD
from localctl.cli.sample_regions import Variant, named
from localctl.cli.sample_sheets import axis_labels, verdict
from localctl.drawing import grid, outline, region_sheet
from localctl.files import first_line, write_bytes, write_json
from localctl.images import condition_to_pil
from localctl.layout import Layout
from localctl.layout_io import load_layout, save_layout
from localctl.sampling import GenerateOutput

_LONGEST_ENDING = 80  # letters of a file name


def open_output(path: str, needed: int) -> Path:
    """Make the output folder, before anything slow. ValueError when that is not possible or nothing can be written
    there, OSError when the disk has not the bytes ``needed``."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be made ({error.strerror}); choose another.") from error
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"The disk of the output folder {folder} is full; make room or choose another.") from error
        raise ValueError(
            f"The output folder {folder} cannot be written to ({error.strerror}); choose another."
        ) from error
    if free < needed:
        raise OSError(
            f"The disk of the output folder {folder} has {free / 1e6:.0f} MB left where the images may take "
            f"{needed / 1e6:.0f} MB; make room or choose another."
        )
    return folder


def save_images(output: GenerateOutput, index: int, variants: Sequence[Variant], folder: Path) -> list[Path]:
    """Write the images of the variant of this ``index``; their paths. OSError that names the file."""
    ending = f"_{endings(variants)[index]}" if len(variants) > 1 else ""
    paths = []
    for name, image in zip(_names(output), output.images, strict=True):
        paths.append(folder / f"{name}{ending}.png")
        _save(image, paths[-1])
    return paths


def endings(variants: Sequence[Variant]) -> list[str]:
    """What each variant's files end with: its label, with its number where that is too long or not its own."""
    names = [named(variant.label) for variant in variants]
    return [
        name if len(name) <= _LONGEST_ENDING and names.count(name) == 1 else f"{name[:_LONGEST_ENDING]}_{index}"
        for index, name in enumerate(names)
    ]


def save_record(options: Mapping[str, Any], paths: Sequence[Path], folder: Path) -> None:
    """Write the flags that repeat the run, and the names of its images. OSError that names the file."""
    record = {"localctl": __version__, "options": options, "images": [path.name for path in paths]}
    write_json(folder / RECORD, record, indent=1, ensure_ascii=False)


def save_sheets(
    outputs: Sequence[tuple[Variant, GenerateOutput]],
    options: Mapping[str, Any],
    conditions: Sequence[Tensor],
    masks: Sequence[Tensor],
    folder: Path,
    read: bool = False,
) -> None:
    """Write ``sheet.png``, or ``compare.png``, or the grids of a sweep. ``read``: put the reader's verdict under images
    with regions, which makes sense for micro scenes. OSError that names the file."""
    first = outputs[0][1]
    if not options["layout"]:
        _save(contact_sheet(first, conditions, masks), folder / "sheet.png")
    elif len(outputs) == 1:
        _save(_layouts_sheet(first, read), folder / "sheet.png")
    elif options["sweep"]:
        for index, name in enumerate(_names(first)):
            _save(_sweep_sheet(outputs, index, read), folder / f"{name}_sweep.png")
    else:
        rows = [[output.images[i] for _, output in outputs] for i in range(len(first.images))]
        columns = [variant.label for variant, _ in outputs]
        _save(
            region_sheet(rows, first.layouts, columns, _captions(first), verdict if read else None),
            folder / "compare.png",
        )


def _save(image: Image.Image, path: Path) -> None:
    try:
        if path.is_symlink():  # replaced, never followed
            path.unlink()
        image.save(path)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OSError(f"{path} could not be written ({reason}); what was written before is kept.") from error


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
    return region_sheet(rows, layouts, labels, [layout.prompt for layout in layouts], verdict if read else None)


def _sweep_sheet(outputs: Sequence[tuple[Variant, GenerateOutput]], index: int, read: bool) -> Image.Image:
    """The grid of one picture: columns and rows are the values of the settings."""
    cells = {(variant.column, variant.row): output.images[index] for variant, output in outputs}
    columns, captions = axis_labels({(variant.column, variant.row): variant.label for variant, _ in outputs})
    rows = [[cells[column, row] for column in range(len(columns))] for row in range(max(1, len(captions)))]
    layout = outputs[0][1].layouts[index]
    captions = captions or [_captions(outputs[0][1])[index]]
    return region_sheet(rows, [layout] * len(rows), columns, captions, verdict if read else None)


def copy_inputs(options: Mapping[str, Any], used: Sequence[Layout], folder: Path) -> dict[str, Any]:
    """Copy the input files to ``folder``/inputs, so that the record needs no others, and no image can take the place
    of one; the options that name them, relative to ``folder``.

    Predicted layouts are written down as they are ``used``: a later predictor changes no recorded run.
    """
    contents = {
        f"inputs/{name}_{index}{Path(path).suffix.lower()[:10]}": (name, Path(path).read_bytes())
        for name in INPUTS
        if name != "layout"
        for index, path in enumerate(options[name] or [])
    }  # all read before any is written: a repeated run may read from the folder it writes to
    predicted = options["layout"] == [AUTO]
    layouts = list(dict.fromkeys(used)) if predicted else [load_layout(path) for path in options["layout"] or ()]
    if (folder / "inputs").is_symlink():
        raise ValueError(f"{folder / 'inputs'} is a link, which could lead anywhere; choose another --output_dir.")
    (folder / "inputs").mkdir(exist_ok=True)
    copies: dict[str, Any] = {"prompt": None, "layout_seed": None, "predictor": None} if predicted else {}
    for index, layout in enumerate(layouts):
        path = save_layout(layout, folder / "inputs" / f"layout_{index}.json")  # with its masks
        copies.setdefault("layout", []).append(str(path.relative_to(folder)))
    for target, (name, content) in contents.items():
        write_bytes(folder / target, content)
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
