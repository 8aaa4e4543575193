"""Sampling with controls: ``attach`` them to a stock diffusers pipeline, or ``generate`` images seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.attach import Attachment, Layouts, attach
from localctl.control.base import Control
from localctl.control.latents import outer_step
from localctl.denoisers import denoiser_of
from localctl.layout import Layout, as_layouts
from localctl.pipelines import with_scheduler
from localctl.sampling_settings import FREE, own_sampling
from localctl.sampling_settings import Sampling as Sampling
from localctl.seeding import generator, noise
from localctl.sizes import shown

__all__ = ["Attachment", "GenerateOutput", "Layouts", "attach", "generate", "image_size", "initial_noise", "outer_step"]

# These schedulers sample one noise for the whole batch from a seed of their own, out of reach of the images' seeds.
_OWN_NOISE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
_OURS = ("prompt", "prompt_embeds", "latents", "generator", "num_images_per_prompt", "return_dict")
_WAY_OUT = "; call the pipeline inside attach."
_WAYS_OUT = {
    "generator": "; give seeds=, one number for each image.",
    "num_images_per_prompt": "; give seeds=, one number for each image.",
}
_PER_LAYOUT = ("negative_prompt", "prompt_2", "negative_prompt_2")


@dataclass(frozen=True)
class GenerateOutput:
    """Images, one per layout and seed, layout by layout; ``seeds`` and ``layouts`` name each image's."""

    images: list[Any]
    seeds: tuple[int, ...]
    layouts: tuple[Layout, ...]


def generate(
    pipe: DiffusionPipeline,
    layout: Layouts,
    controls: Control | Sequence[Control] = (),
    seeds: int | Sequence[int] | None = None,
    *,
    sampling: Sampling | None = None,
    batch_size: int | None = None,
    paired: bool = False,
    **pipeline_arguments: Any,
) -> GenerateOutput:
    """Generate an image of every layout with every seed, or, ``paired``, of each layout with its own seed.

    All noise of an image, the first and that of stochastic schedulers, comes from its own seed alone: it is the same
    whatever the batch size, the other images, the device or the dtype (up to rounding to that dtype).

    Args:
        pipe: a stock text-to-image pipeline, Stable Diffusion 1.x, 2.x or XL.
        layout: a layout, a prompt, or a list of either; all of one size.
        controls: as for :func:`attach`.
        seeds: one seed or several; 0 if neither this nor ``sampling`` says any.
        sampling: how to sample, such as :func:`localctl.sampling_of` gives it; its scheduler is the pipeline's for the
            time of this call. What is said beside it counts before it, and where neither says a guidance scale, a base
            known by name is sampled with its own.
        batch_size: at most this many images at once, 4 if neither this nor ``sampling`` says it.
        paired: as many seeds as layouts, and image i is of layout i with seed i.
        pipeline_arguments: settings of :class:`Sampling` by name, and anything else that ``pipe`` takes.
            ``negative_prompt``, ``prompt_2`` and ``negative_prompt_2`` may be one text for all layouts or a list with
            one per layout.

    Raises:
        ValueError: an argument that this function sets itself, sizes that differ, an image that is not a number (NaN),
            or as for :class:`Sampling` and :func:`attach`.
    """
    layouts = as_layouts(layout)
    for name in _OURS:
        if name in pipeline_arguments:
            raise ValueError(f"generate sets {name!r} itself from layouts and seeds{_WAYS_OUT.get(name, _WAY_OUT)}")
    named = {field.name for field in fields(Sampling)} & set(pipeline_arguments)
    said = Sampling(seeds=seeds, batch_size=batch_size, **{name: pipeline_arguments.pop(name) for name in named})
    how = resolve_sampling(pipe, said, sampling)
    images = _pairs(len(layouts), how.seeds, paired)
    height, width = image_size(pipe, layouts, pipeline_arguments)
    texts = {name: _per_layout(name, pipeline_arguments.pop(name, None), len(layouts)) for name in _PER_LAYOUT}
    generated: list[Any] = []
    dtype = denoiser_of(pipe).module.dtype  # found once: it goes through all layers
    arguments, as_asked = _as_numbers(pipe, {**how.arguments(), **pipeline_arguments})
    with scheduled(pipe, how), attach(pipe, layouts, controls) as attached:
        for first in range(0, len(images), how.batch_size):
            batch = images[first : first + how.batch_size]
            attached.select([index for index, _ in batch])
            output = pipe(
                prompt=[layouts[index].prompt for index, _ in batch],
                height=height,
                width=width,
                latents=torch.cat([initial_noise(pipe, seed, height, width, dtype) for _, seed in batch]),
                generator=[generator(seed, "steps") for _, seed in batch],
                **{name: [text[index] for index, _ in batch] for name, text in texts.items() if text is not None},
                **arguments,
            )
            _check_finite(output.images, batch, layouts)
            generated.extend(as_asked(output.images))
    return GenerateOutput(generated, tuple(seed for _, seed in images), tuple(layouts[index] for index, _ in images))


def resolve_sampling(pipe: DiffusionPipeline, said: Sampling, sampling: Sampling | None = None) -> Any:
    """Return a :class:`Sampling` with seeds and batch size: what is ``said``, else as ``sampling`` says it, else as the
    base has it, if it is known by name."""
    own = own_sampling(str(pipe.config.get("_name_or_path") or ""))
    return said.over(sampling or FREE).over(own).over(Sampling(seeds=0, batch_size=4))


def _pairs(layouts: int, seeds: Sequence[int], paired: bool) -> list[tuple[int, int]]:
    """(layout, seed) of each image."""
    if not paired:
        return [(index, seed) for index in range(layouts) for seed in seeds]
    if len(seeds) != layouts:
        raise ValueError(f"There are {len(seeds)} seeds for {layouts} layouts; paired needs one each.")
    return list(enumerate(seeds))


@contextmanager
def scheduled(pipe: DiffusionPipeline, sampling: Sampling) -> Iterator[None]:
    """``pipe`` with the scheduler that ``sampling`` asks for, for a while. ValueError for one whose noise cannot be set
    image by image."""
    with with_scheduler(pipe, sampling.scheduler):
        if sampling.use_karras_sigmas:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_karras_sigmas=True)
        if type(pipe.scheduler).__name__ in _OWN_NOISE:
            raise ValueError(
                f"{type(pipe.scheduler).__name__} samples noise that the seeds cannot set; "
                "use DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'."
            )
        yield


def _as_numbers(
    pipe: DiffusionPipeline, arguments: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Any], Sequence[Any]]]:
    """Return the arguments with images asked for as numbers, which show NaN where bytes would be black, and what makes
    of these the same images as the pipeline does."""
    processor = getattr(pipe, "image_processor", None)
    if processor is None or arguments.get("output_type", "pil") != "pil" or arguments.get("padding_mask_crop"):
        return arguments, list
    return {**arguments, "output_type": "np"}, processor.numpy_to_pil


def _check_finite(images: Any, batch: Sequence[tuple[int, int]], layouts: Sequence[Layout]) -> None:
    """ValueError naming the seed when an image, given as numbers, holds NaN. ``batch``: (layout, seed) of each."""
    for image, (index, seed) in zip(images, batch, strict=False):
        if isinstance(image, (np.ndarray, Tensor)) and not bool(torch.as_tensor(image).isfinite().all()):
            raise ValueError(
                f"The image of seed {seed} of the prompt {shown(layouts[index].prompt)} is not a number (NaN); lower "
                "strengths and guidance scale, or use float32 (in float16, values over 65,504 overflow)."
            )


def initial_noise(
    pipe: DiffusionPipeline, seed: int, height: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the noise an image starts from: standard normal (1, C, h, w); the pipeline scales it for its scheduler.

    ``dtype``: default that of the denoiser.
    """
    denoiser = denoiser_of(pipe)
    return noise(denoiser.noise_shape(height, width), seed, "latents", dtype=dtype or denoiser.module.dtype)


def image_size(pipe: DiffusionPipeline, layouts: Sequence[Layout], arguments: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels: the layouts', or those in ``arguments`` (taken out), or the base's own."""
    asked = Layout("", arguments.pop("height", None), arguments.pop("width", None))  # checks the two
    sizes = {item.size for item in (*layouts, asked) if item.size is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"Sizes (height, width) differ: {', '.join(map(str, sorted(sizes)))}; generate one size per call."
        )
    if sizes:
        return sizes.pop()
    return denoiser_of(pipe).own_size


def _per_layout(name: str, value: str | Sequence[str] | None, count: int) -> list[str] | None:
    if value is None or isinstance(value, str):
        return None if value is None else [value] * count
    if len(value) != count:
        raise ValueError(f"There are {len(value)} texts in {name} for {count} layouts; give one for all or one each.")
    return list(value)
