"""The sheets of a run: all images of it side by side, with regions outlined and, on the embedded base, judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from localctl.bases import same_base
from localctl.boxes import Found, box_around
from localctl.drawing import grid, outline, region_sheet
from localctl.images import condition_to_pil
from localctl.jobs.embedded import Record
from localctl.jobs.files import names_of, save
from localctl.jobs.prepare import Job
from localctl.jobs.variants import Variant
from localctl.layout import Layout, Region
from localctl.sampling import GenerateOutput


def save_sheets(
    outputs: Sequence[tuple[Variant, GenerateOutput]], job: Job, folder: Path, record: Record | None = None
) -> None:
    """Write ``sheet.png``, or ``compare.png``, or a grid per image for a sweep, with ``record`` inside. OSError that
    names the file.

    On the embedded base, each image with regions is captioned with what the reader of micro scenes finds in it.
    """
    first = outputs[0][1]
    read = verdict if same_base(job.base.name, "micro") else None
    if not job.options.layout:
        save(_contact_sheet(first, job), folder / "sheet.png", record)
    elif len(outputs) == 1:
        labels, rows, layouts = _rows_by_layout(first)
        captions = [layout.prompt for layout in layouts]
        save(region_sheet(rows, layouts, labels, captions, read), folder / "sheet.png", record)
    elif job.options.sweep:
        for index, name in enumerate(names_of(first.seeds)):
            columns, captions, rows = _sweep_grid(outputs, index)
            layouts = [first.layouts[index]] * len(rows)
            captions = captions or [_captions(first)[index]]
            save(region_sheet(rows, layouts, columns, captions, read), folder / f"{name}_sweep.png", record)
    else:
        rows = [[output.images[i] for _, output in outputs] for i in range(len(first.images))]
        columns = [variant.label for variant, _ in outputs]
        save(region_sheet(rows, first.layouts, columns, _captions(first), read), folder / "compare.png", record)


def _captions(output: GenerateOutput) -> list[str]:
    return [f"seed {seed}: {layout.prompt}" for seed, layout in zip(output.seeds, output.layouts, strict=True)]


def _rows_by_layout(output: GenerateOutput) -> tuple[list[str], list[list[Image.Image]], list[Layout]]:
    """Return the labels of the columns, one per seed; the images, one row per layout; and the rows' layouts."""
    seeds = list(dict.fromkeys(output.seeds))
    starts = range(0, len(output.images), len(seeds))
    rows = [output.images[i : i + len(seeds)] for i in starts]
    return [f"seed {seed}" for seed in seeds], rows, [output.layouts[i] for i in starts]


def _contact_sheet(output: GenerateOutput, job: Job) -> Image.Image:
    """Compose one row per prompt: every condition with the outline of its mask, then the images."""
    conditions = [
        outline(condition_to_pil(item.condition), item.mask) for item in (*job.adapters, *job.addons.controlnets)
    ]
    labels, rows, layouts = _rows_by_layout(output)
    labels = ["condition"] * len(conditions) + labels
    return grid([[*conditions, *row] for row in rows], labels, [layout.prompt for layout in layouts])


def _sweep_grid(
    outputs: Sequence[tuple[Variant, GenerateOutput]], index: int
) -> tuple[list[str], list[str], list[list[Image.Image]]]:
    """Return the labels of the columns and of the rows (none for a sweep over one setting), and the rows of the image
    with this ``index`` under all values."""
    cells = {(variant.column, variant.row): (variant, output) for variant, output in outputs}
    columns, rows = (max(place[axis] for place in cells) + 1 for axis in (0, 1))
    of_columns = [cells[column, 0][0].label.split(" ")[0] for column in range(columns)]
    of_rows = [cells[0, row][0].label.split(" ")[1] for row in range(rows)] if rows > 1 else []
    images = [[cells[column, row][1].images[index] for column in range(columns)] for row in range(rows)]
    return of_columns, of_rows, images


def verdict(image: Image.Image, layout: Layout) -> list[str]:
    """Return one line per region with a phrase: the IoU of its box with the object that the reader of micro scenes
    finds, or that the object is missing."""
    from localctl.metrics.detection import best_matches
    from localctl.micro.detect import find_objects

    masks = layout.masks((image.height, image.width))[:, 0]
    wanted = [
        Found(_object(region), box_around(mask.numpy()))
        for region, mask in zip(layout.regions, masks, strict=True)
        if region.phrase
    ]
    matches = best_matches(wanted, find_objects(np.asarray(image.convert("RGB"))))
    return [
        f"{item.label}: {'missing' if match is None else f'IoU {match:.2f}'}"
        for item, match in zip(wanted, matches, strict=True)
    ]


def _object(region: Region) -> str:
    """Return the phrase without its article, as the reader names objects."""
    words = (region.phrase or "").split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words)
