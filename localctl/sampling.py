"""Sampling with controls: ``attach`` them to a stock diffusers pipeline, or ``generate`` images seed by seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.bases import SIGMAS
from localctl.control.attach import Attachment, Layouts, attach
from localctl.control.base import Control
from localctl.control.latents import outer_step
from localctl.denoisers import denoiser_of
from localctl.image_to_image import InitImage
from localctl.layout import Layout, as_layouts
from localctl.pipelines import knows_sigmas, no_sigmas, with_scheduler
from localctl.previews import OnStep, each_step
from localctl.sampling_settings import FREE, check_stated, own_sampling
from localctl.sampling_settings import Sampling as Sampling
from localctl.schedulers import check_seedable
from localctl.seeding import generator, noise
from localctl.sizes import near_side, shown

__all__ = ["Attachment", "GenerateOutput", "Layouts", "attach", "generate", "image_size", "initial_noise", "outer_step"]

# Arguments of the pipeline that generate sets itself.
_RESERVED = ("prompt", "prompt_embeds", "latents", "generator", "num_images_per_prompt", "return_dict")
_WAY_OUT = "; call the pipeline inside attach."
_WAYS_OUT = {
    "generator": "; give seeds=, one number for each image.",
    "num_images_per_prompt": "; give seeds=, one number for each image.",
}
_PER_LAYOUT = ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")


@dataclass(frozen=True)
class GenerateOutput:
    """The images, one per layout and seed, layout by layout, with the seed and the layout of each."""

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
    init: InitImage | None = None,
    on_step: OnStep | None = None,
    **pipeline_arguments: Any,
) -> GenerateOutput:
    """Generate an image of every layout with every seed, or, if ``paired``, of each layout with its own seed.

    All noise of an image, the initial noise and that of stochastic schedulers, depends only on its seed: it is the same
    for any batch size, other images, device and dtype (up to rounding to that dtype).

    Args:
        pipe: a stock text-to-image pipeline of a base that :mod:`localctl.denoisers` knows.
        layout: a layout, a prompt, or a list of either; all of one size.
        controls: as for :func:`attach`.
        seeds: one seed or several; default 0.
        sampling: settings, for example from :func:`localctl.sampling_of`, over which the other arguments take
            precedence; its scheduler is used during this call. A base known by name has a default guidance scale.
        batch_size: at most this many images at once; default 4.
        paired: image i has layout i and seed i; there must be as many seeds as layouts.
        init: the image to start from, all of it or within a mask, see :class:`~localctl.image_to_image.InitImage`.
        on_step: called with a :class:`~localctl.previews.SamplingStep` after every step of every batch; an error that
            it raises ends the sampling there.
        pipeline_arguments: settings of :class:`Sampling`, and other arguments of ``pipe``. ``negative_prompt``,
            ``prompt_2``, ``negative_prompt_2`` and so on may be one text, or a list with one text per layout.

    Raises:
        ValueError: a reserved argument, several sizes, NaN in an image, or as for :class:`Sampling`, :func:`attach`.
    """
    layouts = as_layouts(layout)
    resolved = resolve_sampling(pipe, _taken_from(pipeline_arguments, seeds, batch_size), sampling)
    images = _pairs(len(layouts), resolved.seeds, paired)
    size = image_size(pipe, layouts, pipeline_arguments, init)
    init = init and init.prepared(size, resolved.num_inference_steps, pipeline_arguments.get("output_type", "pil"))
    texts = _texts(layouts, pipeline_arguments)
    generated: list[Any] = []
    arguments, convert = _as_numbers(pipe, {**_own(pipe, init, resolved), **pipeline_arguments})
    with (
        scheduled(pipe, resolved),
        each_step(caller := pipe if init is None else init.pipeline(pipe, arguments), on_step, size) as begin,
        attach(caller, layouts, controls, prompt_weighting=resolved.prompt_weighting) as attached,
    ):
        start = _start(caller, size, init)
        for first in range(0, len(images), resolved.batch_size):
            batch = images[first : first + resolved.batch_size]
            indices, own_seeds = [index for index, _ in batch], [seed for _, seed in batch]
            attached.select(indices)
            begin()
            output = caller(**texts(indices), **start(first, own_seeds), **arguments)
            _check_finite(output.images, batch, layouts)
            generated.extend(convert(output.images))
    generated = generated if init is None else [init.finish(image) for image in generated]
    return GenerateOutput(generated, tuple(seed for _, seed in images), tuple(layouts[index] for index, _ in images))


def _taken_from(
    pipeline_arguments: dict[str, Any], seeds: int | Sequence[int] | None, batch_size: int | None
) -> Sampling:
    """Take the settings of :class:`Sampling` out of the arguments. ValueError for arguments that generate sets."""
    for name in _RESERVED:
        if name in pipeline_arguments:
            raise ValueError(f"generate sets {name!r} itself from layouts and seeds{_WAYS_OUT.get(name, _WAY_OUT)}")
    named = {field.name for field in fields(Sampling)} & set(pipeline_arguments)
    return Sampling(seeds=seeds, batch_size=batch_size, **{name: pipeline_arguments.pop(name) for name in named})


def _texts(
    layouts: Sequence[Layout], pipeline_arguments: dict[str, Any]
) -> Callable[[Sequence[int]], dict[str, list[str]]]:
    """Take the texts out of the arguments, and return a function of a batch's layouts: the texts as arguments."""
    texts = {name: _per_layout(name, pipeline_arguments.pop(name, None), len(layouts)) for name in _PER_LAYOUT}
    texts["prompt"] = [layout.prompt for layout in layouts]
    return lambda indices: {name: [own[i] for i in indices] for name, own in texts.items() if own is not None}


def _start(
    pipe: DiffusionPipeline, size: tuple[int, int], init: InitImage | None
) -> Callable[[int, Sequence[int]], dict[str, Any]]:
    """Return a function of a batch, by the index of its first image and its seeds: the arguments by which it starts."""
    if init is not None:
        # Some pipelines would take the base's own size.
        sized = init.mask is None and "height" in inspect.signature(type(pipe).__call__).parameters
        own = {"height": size[0], "width": size[1]} if sized else {}
        factor = pipe.vae_scale_factor
        return lambda first, seeds: own | init.arguments(first, len(seeds), size, factor) | _generators(seeds)
    dtype = denoiser_of(pipe).module.dtype  # once: the property looks at all layers

    def from_noise(first: int, seeds: Sequence[int]) -> dict[str, Any]:
        latents = torch.cat([initial_noise(pipe, seed, *size, dtype) for seed in seeds])
        return {"height": size[0], "width": size[1], "latents": latents, **_generators(seeds)}

    return from_noise


def _generators(seeds: Sequence[int]) -> dict[str, Any]:
    """Return the argument for the noise between the steps."""
    return {"generator": [generator(seed, "steps") for seed in seeds]}


def resolve_sampling(pipe: DiffusionPipeline, given: Sampling, sampling: Sampling | None = None) -> Any:
    """Return a :class:`Sampling` with seeds and batch size set.

    Each setting is that of ``given``, else of ``sampling``, else the default of a base known by name.
    """
    own = own_sampling(str(pipe.config.get("_name_or_path") or ""))
    return given.over(sampling or FREE).over(own).over(Sampling(seeds=0, batch_size=4))


def _pairs(layouts: int, seeds: Sequence[int], paired: bool) -> list[tuple[int, int]]:
    """Return (layout, seed) of each image."""
    if not paired:
        return [(index, seed) for index in range(layouts) for seed in seeds]
    if len(seeds) != layouts:
        raise ValueError(f"There are {len(seeds)} seeds for {layouts} layouts; with paired, give one seed per layout.")
    return list(enumerate(seeds))


@contextmanager
def scheduled(pipe: DiffusionPipeline, sampling: Sampling) -> Iterator[None]:
    """Give ``pipe`` the scheduler of ``sampling`` for a while. ValueError if its noise cannot be set image by image."""
    with with_scheduler(pipe, sampling.scheduler):
        if sampling.sigmas is not None:
            if not knows_sigmas(type(pipe.scheduler).__name__, sampling.sigmas):
                raise no_sigmas(type(pipe.scheduler).__name__, sampling.sigmas)
            spacing = {f"use_{name}_sigmas": name == sampling.sigmas for name in SIGMAS}
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **spacing)
        stochastic = getattr(getattr(pipe.scheduler, "config", None), "stochastic_sampling", False)
        check_seedable(type(pipe.scheduler).__name__, type(pipe).__name__, stochastic)
        yield


def _own(pipe: DiffusionPipeline, init: InitImage | None, sampling: Sampling) -> dict[str, Any]:
    """Return the arguments of a call for these settings, and those that the pipeline's own family needs, if it is the
    one that is called. ValueError for a setting of some families that this one does not take."""
    for name in ("true_cfg_scale", "max_sequence_length"):
        if getattr(sampling, name) is not None and name not in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(f"A {type(pipe).__name__} takes no {name}; leave it out.")
    if (sampling.clip_skip or 0) < 0:
        raise ValueError(f"The clip skip must be at least 0, not {sampling.clip_skip}.")
    denoiser = denoiser_of(pipe)
    index = {**pipe.config, "_class_name": type(pipe).__name__}
    denoiser.check_text_length(denoiser.module.config, index, sampling.max_sequence_length, "")
    if denoiser.guidance(denoiser.module.config, index).scale is None:
        check_stated(str(pipe.config.get("_name_or_path") or ""))
    return {**(denoiser.own_arguments if init is None else {}), **sampling.arguments()}


def _as_numbers(
    pipe: DiffusionPipeline, arguments: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Any], Sequence[Any]]]:
    """Return the arguments with arrays as output type, and a function that converts these to the pipeline's images.

    In arrays NaN can be detected, which 8-bit images would show as black.
    """
    processor = getattr(pipe, "image_processor", None)
    if processor is None or arguments.get("output_type", "pil") != "pil" or arguments.get("padding_mask_crop"):
        return arguments, list
    return {**arguments, "output_type": "np"}, processor.numpy_to_pil


def _check_finite(images: Any, batch: Sequence[tuple[int, int]], layouts: Sequence[Layout]) -> None:
    """Raise a ValueError naming the seed of an image that holds NaN. ``batch``: (layout, seed) of each."""
    for image, (index, seed) in zip(images, batch, strict=False):
        if isinstance(image, (np.ndarray, Tensor)) and not bool(torch.as_tensor(image).isfinite().all()):
            raise ValueError(
                f"The image with seed {seed} of the prompt {shown(layouts[index].prompt)} holds NaN; lower strengths "
                "and guidance scale, or use float32 (in float16, values over 65,504 overflow)."
            )


def initial_noise(
    pipe: DiffusionPipeline, seed: int, height: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Sample the initial noise of an image: standard normal (1, C, h, w); the pipeline scales it for its scheduler.

    ``dtype``: by default the denoiser's.
    """
    denoiser = denoiser_of(pipe)
    return noise(denoiser.noise_shape(height, width), seed, "latents", dtype=dtype or denoiser.module.dtype)


def image_size(
    pipe: DiffusionPipeline, layouts: Sequence[Layout], arguments: dict[str, Any], init: InitImage | None = None
) -> tuple[int, int]:
    """Return (height, width) in pixels: the layouts', or those popped from ``arguments``, or the nearest to those
    of the image to start from, or the base's default.

    ValueError when they differ.
    """
    given = Layout("", arguments.pop("height", None), arguments.pop("width", None))  # a layout checks them
    sizes = {item.size for item in (*layouts, given) if item.size is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"Sizes (height, width) differ: {', '.join(map(str, sorted(sizes)))}; generate one size per call."
        )
    if sizes:
        return sizes.pop()
    if init is not None and init.size is not None:
        return near_side(init.size[0]), near_side(init.size[1])
    return denoiser_of(pipe).own_size


def _per_layout(name: str, value: str | Sequence[str] | None, count: int) -> list[str] | None:
    if value is None or isinstance(value, str):
        return None if value is None else [value] * count
    if len(value) != count:
        raise ValueError(
            f"There are {len(value)} texts in {name} for {count} layouts; give one for all or one per layout."
        )
    return list(value)
