"""A run of ``sample.py`` from its settings to its files: images, a contact sheet, and a record that repeats it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from localctl.jobs.embedded import MOST_TEXT, embedded, record_text
from localctl.jobs.files import (
    file_endings,
    names_of,
    open_output,
    read_inputs,
    save,
    save_images,
    save_record,
    subfolder,
    write_inputs,
)
from localctl.jobs.generate import JobModels, StepProgress, generate_job, load_models
from localctl.jobs.prepare import Job, prepare, reproducing_options
from localctl.jobs.settings import SampleSettings
from localctl.jobs.sheets import save_sheets
from localctl.lock import FolderLock

logger = logging.getLogger(__name__)
_BYTES_PER_PIXEL = 9  # of an image and its places on sheets, at worst


def run(options: SampleSettings) -> Iterator[Path]:
    """Generate the images and yield their paths as they are written.

    ValueError and OSError in one sentence, also for an output folder that another run is using; all that can be checked
    without the base is checked before it is loaded.
    """
    job = prepare(options)
    for note in job.notes:
        logger.info(note)
    height, width = job.second.size if job.second else job.size
    pixels = height * width * job.image_count * len(job.variants)
    folder = open_output(options.output_dir, _BYTES_PER_PIXEL * pixels)
    lock = FolderLock(folder)
    try:
        yield from _generate_all(job, folder)
    finally:
        lock.release()


def _generate_all(job: Job, folder: Path) -> Iterator[Path]:
    """Generate the images with each variant and write everything, while the output folder is locked."""
    subfolder(folder, "inputs")  # refused before anything slow
    inputs = read_inputs(vars(job.options), job.layouts)
    models = load_models(job)  # before an earlier run is moved: it stays where it is if that fails
    copies = write_inputs(inputs, vars(job.options), folder)
    # By the names that the user gave, while the record of the folder has the places found.
    record = embedded({**vars(job.options), **copies}, folder) if job.options.embed_record else None
    if record and len(record_text(record).encode()) > MOST_TEXT:
        logger.info("the record of this run is too long to be written into its images; sample.json repeats it.")
        record = None
    outputs, paths = [], []
    on_step = None if job.options.save_steps is None else partial(_save_step, job, models, subfolder(folder, "steps"))
    for variant, output in generate_job(job, models, on_step):
        outputs.append((variant, output))
        written = save_images(output, len(outputs) - 1, job.variants, folder, record)
        paths += written
        yield from written
    save_record({**reproducing_options(job), **copies}, paths, folder)
    save_sheets(outputs, job, folder, record)


def _save_step(job: Job, models: JobModels, folder: Path, progress: StepProgress) -> None:
    """Write previews of a batch to ``folder`` after every ``save_steps`` steps. OSError that names the file."""
    if progress.latents is None or progress.step % (job.options.save_steps or 1):
        return
    endings = [""] if len(job.variants) == 1 else [f"_{name}" for name in file_endings(job.variants)]
    ending = next(end for end, one in zip(endings, job.variants, strict=True) if one is progress.variant)
    ending += f"{'_upscaled' if progress.second else ''}_step{progress.step:03d}.png"
    names = names_of(job.options.seeds * len(job.layouts))
    for image, preview in zip(progress.images, models.preview(progress.latents), strict=True):
        save(preview, folder / f"{names[image]}{ending}")
