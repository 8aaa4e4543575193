"""A run of ``sample.py`` from its flags to its files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from localctl.cli.sample_files import copy_inputs, open_output, save_images, save_record, save_sheets
from localctl.cli.sample_job import Job, prepare, reproducing_options
from localctl.cli.sample_record import SampleSettings
from localctl.cli.sample_regions import Variant
from localctl.control.base import Control
from localctl.control.image_controls import LocalAdapterControl
from localctl.lock import FolderLock
from localctl.metrics.clip import Clip
from localctl.pipelines import load_pipeline, resolve_base, same_base
from localctl.sampling import GenerateOutput, Sampling, generate
from localctl.weight_search.weights import OptimizedSpaceTime, clip_beside, generate_optimized

logger = logging.getLogger(__name__)
_BYTES_PER_PIXEL = 9  # of an image and its places on sheets, at worst


def run(options: SampleSettings) -> Iterator[Path]:
    """The paths of the images, as they are written. ValueError and OSError in one sentence, of an output folder that
    another run holds, too; whatever can be known before is raised before the base is loaded."""
    job = prepare(options)
    for note in job.notes:
        logger.info(note)
    count = len(job.layouts) * len(options.seeds)
    folder = open_output(options.output_dir, _BYTES_PER_PIXEL * job.size[0] * job.size[1] * count * len(job.variants))
    lock = FolderLock(folder)
    try:
        yield from _generated(job, folder, count)
    finally:
        lock.release()


def _generated(job: Job, folder: Path, count: int) -> Iterator[Path]:
    """:func:`run`, with the output folder locked; ``count`` images with each variant."""
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
    record = reproducing_options(job)
    save_record({**record, **copies}, paths, folder)
    conditions, masks = [item.condition for item in job.adapters], [item.mask for item in job.adapters]
    read = same_base(job.base.name, "micro")  # whose images the reader of micro scenes can read
    save_sheets(outputs, record, conditions, masks, folder, read)


def load_adapters(job: Job) -> list[LocalAdapterControl]:
    """ValueError when the weights of one are missing or damaged."""
    controls = []
    for item in job.adapters:
        adapter = item.saved.load().to(job.device).eval().requires_grad_(False)
        controls.append(LocalAdapterControl(adapter, item.condition, item.mask, item.weight, item.start, item.end))
    return controls


def load_clips(job: Job) -> dict[str, Clip]:
    """What judges the images of each control that is optimised, by its name. ValueError when it is not there."""
    names = {
        control.clip
        for variant in job.variants
        for control in variant.controls
        if isinstance(control, OptimizedSpaceTime)
    }
    base = resolve_base(job.base.name).id_or_path
    return {name: clip_beside(name, base, job.device) for name in sorted(names)}


def generate_variant(
    pipe: DiffusionPipeline, job: Job, variant: Variant, adapters: Sequence[Control], clips: Mapping[str, Clip]
) -> GenerateOutput:
    """The job's images in one of its ways, beside the adapters; weights that are to be optimised are, for each image.
    The pipeline's scheduler is as before when it is done."""
    options, own = job.options, Sampling(guidance_scale=resolve_base(job.base.name).guidance_scale)
    how = Sampling.of(options).over(variant.sampling).over(own)
    how = replace(how, clip_skip=how.clip_skip or None)  # 0 skips nothing
    controls = [*adapters, *variant.controls]
    said: dict[str, Any] = {"sampling": how, "negative_prompt": options.negative_prompt}
    for control in controls:
        if isinstance(control, OptimizedSpaceTime):
            return generate_optimized(pipe, job.layouts, controls, clip=clips[control.clip], **said)
    return generate(pipe, job.layouts, controls, **said)
