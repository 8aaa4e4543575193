"""A run of ``sample.py`` from its settings to its files: images, a contact sheet, and a record that repeats it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from localctl import __version__
from localctl.bases import same_base
from localctl.boxes import Found, box_around
from localctl.cli.sample_job import Job, prepare, reproducing_options
from localctl.cli.sample_settings import AUTO, INPUTS, RECORD, SampleSettings
from localctl.cli.sample_variants import Variant, file_label, optimized_controls
from localctl.control.base import Control
from localctl.control.image_controls import LocalAdapterControl
from localctl.drawing import grid, outline, region_sheet
from localctl.files import first_line, write_bytes, write_json
from localctl.images import condition_to_pil
from localctl.layout import Layout, Region
from localctl.layout_io import load_layout, save_layout
from localctl.lock import FolderLock
from localctl.pipelines import load_pipeline, resolve_base
from localctl.sampling import GenerateOutput, Sampling, generate

if TYPE_CHECKING:  # imported where weights are optimised
    from localctl.metrics.clip import Clip

logger = logging.getLogger(__name__)
_BYTES_PER_PIXEL = 9  # of an image and its places on sheets, at worst
_LONGEST_ENDING = 80  # letters of a file name


def run(options: SampleSettings) -> Iterator[Path]:
    """Generate the images and yield their paths as they are written.

    ValueError and OSError in one sentence, also for an output folder that another run is using; all that can be checked
    without the base is checked before it is loaded.
    """
    job = prepare(options)
    for note in job.notes:
        logger.info(note)
    count = len(job.layouts) * len(options.seeds)
    folder = open_output(options.output_dir, _BYTES_PER_PIXEL * job.size[0] * job.size[1] * count * len(job.variants))
    lock = FolderLock(folder)
    try:
        yield from _generate_all(job, folder, count)
    finally:
        lock.release()


def _generate_all(job: Job, folder: Path, count: int) -> Iterator[Path]:
    """Generate ``count`` images with each variant and write everything, while the output folder is locked."""
    options = job.options
    controls, clips = load_adapters(job), load_clips(job)
    copies = copy_inputs(vars(options), job.layouts, folder)
    logger.info(f"loading the base {job.base.name} ...")
    pipe = load_pipeline(job.base, device=job.device)
    outputs, paths = [], []
    for variant in job.variants:
        of = f" with {variant.label}" if len(job.variants) > 1 else ""
        logger.info(f"generating {count} image{'s'[: count - 1]}{of}, at most {options.batch_size} at once ...")
        output = generate_variant(pipe, job, variant, controls, clips)
        outputs.append((variant, output))
        written = save_images(output, len(outputs) - 1, job.variants, folder)
        paths += written
        yield from written
    save_record({**reproducing_options(job), **copies}, paths, folder)
    save_sheets(outputs, job, folder)


def load_adapters(job: Job) -> list[LocalAdapterControl]:
    """Load the adapters of a job onto its device, as controls.

    ValueError when the weights of one are missing or damaged.
    """
    controls = []
    for item in job.adapters:
        adapter = item.saved.load().to(job.device).eval().requires_grad_(False)
        controls.append(LocalAdapterControl(adapter, item.condition, item.mask, item.weight, item.start, item.end))
    return controls


def load_clips(job: Job) -> dict[str, Clip]:
    """Load the CLIP models that optimised controls ask for, by name. ValueError when one is not there."""
    names = {control.clip for variant in job.variants for control in optimized_controls(variant)}
    if not names:
        return {}
    from localctl.weight_search.weights import clip_beside  # with the metrics, not needed otherwise

    base = resolve_base(job.base.name).id_or_path
    return {name: clip_beside(name, base, job.device) for name in sorted(names)}


def generate_variant(
    pipe: DiffusionPipeline, job: Job, variant: Variant, adapters: Sequence[Control], clips: Mapping[str, Clip]
) -> GenerateOutput:
    """Generate the images of one variant, with the adapters too; weights that are to be optimised are optimised for
    each image. The pipeline has its own scheduler again afterwards."""
    options, own = job.options, Sampling(guidance_scale=resolve_base(job.base.name).guidance_scale)
    sampling = Sampling.of(options).over(variant.sampling).over(own)
    sampling = replace(sampling, clip_skip=sampling.clip_skip or None)  # 0 skips nothing
    controls = [*adapters, *variant.controls]
    shared: dict[str, Any] = {"sampling": sampling, "negative_prompt": options.negative_prompt}
    for control in optimized_controls(variant):
        from localctl.weight_search.weights import generate_optimized

        return generate_optimized(pipe, job.layouts, controls, clip=clips[control.clip], **shared)
    return generate(pipe, job.layouts, controls, **shared)


def open_output(path: str, needed: int) -> Path:
    """Create the output folder, before anything slow. ValueError when that fails or nothing can be written there,
    OSError when fewer bytes than ``needed`` are free on its disk."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be created ({error.strerror}); choose another.") from error
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
            f"The disk of the output folder {folder} has {free / 1e6:.0f} MB free but the images may take "
            f"{needed / 1e6:.0f} MB; make room or choose another."
        )
    return folder


def save_images(output: GenerateOutput, index: int, variants: Sequence[Variant], folder: Path) -> list[Path]:
    """Write the images of the variant with this ``index``; return their paths. OSError that names the file."""
    ending = f"_{file_endings(variants)[index]}" if len(variants) > 1 else ""
    paths = []
    for name, image in zip(_file_names(output), output.images, strict=True):
        paths.append(folder / f"{name}{ending}.png")
        _save(image, paths[-1])
    return paths


def file_endings(variants: Sequence[Variant]) -> list[str]:
    """Return the end of each variant's file names: its label, shortened and numbered where it is too long or not
    unique."""
    names = [file_label(variant.label) for variant in variants]
    return [
        name if len(name) <= _LONGEST_ENDING and names.count(name) == 1 else f"{name[:_LONGEST_ENDING]}_{index}"
        for index, name in enumerate(names)
    ]


def save_record(options: Mapping[str, Any], paths: Sequence[Path], folder: Path) -> None:
    """Write the options that repeat the run, and the names of its images. OSError that names the file."""
    record = {"localctl": __version__, "options": options, "images": [path.name for path in paths]}
    write_json(folder / RECORD, record, indent=1, ensure_ascii=False)


def save_sheets(outputs: Sequence[tuple[Variant, GenerateOutput]], job: Job, folder: Path) -> None:
    """Write ``sheet.png``, or ``compare.png``, or a grid per image for a sweep. OSError that names the file.

    On the embedded base, each image with regions is captioned with what the reader of micro scenes finds in it.
    """
    first = outputs[0][1]
    read = verdict if same_base(job.base.name, "micro") else None
    if not job.options.layout:
        _save(_contact_sheet(first, job), folder / "sheet.png")
    elif len(outputs) == 1:
        labels, rows, layouts = _rows_by_layout(first)
        captions = [layout.prompt for layout in layouts]
        _save(region_sheet(rows, layouts, labels, captions, read), folder / "sheet.png")
    elif job.options.sweep:
        for index, name in enumerate(_file_names(first)):
            columns, captions, rows = _sweep_grid(outputs, index)
            layouts = [first.layouts[index]] * len(rows)
            captions = captions or [_captions(first)[index]]
            _save(region_sheet(rows, layouts, columns, captions, read), folder / f"{name}_sweep.png")
    else:
        rows = [[output.images[i] for _, output in outputs] for i in range(len(first.images))]
        columns = [variant.label for variant, _ in outputs]
        _save(region_sheet(rows, first.layouts, columns, _captions(first), read), folder / "compare.png")


def _save(image: Image.Image, path: Path) -> None:
    try:
        if path.is_symlink():  # replaced, never followed
            path.unlink()
        image.save(path)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OSError(f"{path} could not be written ({reason}); what was written before is kept.") from error


def _file_names(output: GenerateOutput) -> list[str]:
    """Return the beginning of each image's file name."""
    count = len(dict.fromkeys(output.seeds))
    return [f"{i // count:02d}_seed{seed}" for i, seed in enumerate(output.seeds)]


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
    conditions = [outline(condition_to_pil(item.condition), item.mask) for item in job.adapters]
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


def copy_inputs(options: Mapping[str, Any], used: Sequence[Layout], folder: Path) -> dict[str, Any]:
    """Copy the input files to ``folder``/inputs and return the settings that name the copies, relative to ``folder``:
    the record needs no other files, and no image can overwrite one of them.

    Predicted layouts are saved as they were ``used``, so that the record does not depend on the predictor.
    """
    contents = {
        f"inputs/{name}_{index}{Path(path).suffix.lower()[:10]}": (name, Path(path).read_bytes())
        for name in INPUTS
        if name != "layout"
        for index, path in enumerate(options[name] or [])
    }  # all are read before any is written: a repeated run may read from its own folder
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
