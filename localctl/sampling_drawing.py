"""The pictures of a run of ``sample.py``."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from localctl.base import resolve_base, with_scheduler
from localctl.control.base import Control
from localctl.optimization.weights import OptimizedSpaceTime, generate_optimized
from localctl.sampling import GenerateOutput, generate
from localctl.sampling_cli import Job
from localctl.sampling_regions import Variant


def draw(pipe: DiffusionPipeline, job: Job, variant: Variant, adapters: Sequence[Control] = ()) -> GenerateOutput:
    """The job's pictures in one of its ways, beside the adapters; weights that are to be optimised are, for each
    picture. The pipeline's scheduler is as before when it is done."""
    options = job.options
    scale = options.guidance_scale
    if scale is None:
        scale = variant.sampling.guidance_scale or resolve_base(job.base.name).guidance_scale
    arguments = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": scale,
        "negative_prompt": options.negative_prompt,
    }
    controls = [*adapters, *variant.controls]
    with with_scheduler(pipe, options.scheduler or variant.sampling.scheduler):
        if any(isinstance(control, OptimizedSpaceTime) for control in controls):
            return generate_optimized(pipe, job.layouts, controls, options.seeds, **arguments)
        return generate(pipe, job.layouts, controls, options.seeds, batch_size=options.batch_size, **arguments)
