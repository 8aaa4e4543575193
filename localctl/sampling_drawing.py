"""The pictures of a run of ``sample.py``."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from localctl.control.base import Control
from localctl.optimization.weights import OptimizedSpaceTime, generate_optimized
from localctl.sampling import GenerateOutput, generate
from localctl.sampling_cli import Job


def draw(pipe: DiffusionPipeline, job: Job, controls: Sequence[Control]) -> GenerateOutput:
    """The job's pictures under these controls; weights that are to be optimised are, for each picture."""
    options = job.options
    arguments = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
    }
    if any(isinstance(control, OptimizedSpaceTime) for control in controls):
        return generate_optimized(pipe, job.layouts, controls, options.seeds, **arguments)
    return generate(pipe, job.layouts, controls, options.seeds, batch_size=options.batch_size, **arguments)
