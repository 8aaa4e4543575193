"""The engine of a run: load the models of a job, keep those that the next job needs too, generate step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.base import Control
from localctl.control.image_controls import LocalAdapterControl
from localctl.denoisers import denoiser_of
from localctl.image_to_image import InitImage
from localctl.jobs.addons import Addons
from localctl.jobs.inputs import AdapterJob, value_for
from localctl.jobs.placing import PlacedAddons, file_state
from localctl.jobs.prepare import Job
from localctl.jobs.settings import SampleSettings
from localctl.jobs.starts import SecondPass
from localctl.jobs.variants import Variant, optimized_controls
from localctl.layout import Layout
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base
from localctl.previews import LatentPreview, OnStep, SamplingStep
from localctl.sampling import GenerateOutput, Sampling, generate

if TYPE_CHECKING:  # imported where weights are optimised
    from localctl.metrics.clip import Clip

logger = logging.getLogger(__name__)


class Cancelled(Exception):
    """The user ended a job; raise it from ``on_step``."""


@dataclass(frozen=True)
class StepProgress:
    """A sampling step of a job, after it.

    step, of, latents: as of :class:`~localctl.previews.SamplingStep`. images: the indices of the images of this batch
    among those of the variant. done: the part of the whole job that is done, in (0, 1]. second: whether this is the
    second pass.
    """

    step: int
    of: int
    images: tuple[int, ...]
    variant: Variant
    latents: Tensor | None
    done: float
    second: bool

    @property
    def image_count(self) -> int:
        """How many images are in this batch."""
        return len(self.images)


@dataclass
class JobModels:
    """The models of a job, loaded. Pass them to the next :func:`load_models`, which keeps what is still needed.

    adapters: by place, each with what tells whether its files are still the same. clips: by name.
    """

    base: BaseConfig
    device: torch.device
    pipe: DiffusionPipeline | None
    adapters: dict[str, tuple[object, LocalAdapter]] = field(default_factory=dict)
    placed: PlacedAddons = field(default_factory=PlacedAddons)
    clips: dict[str, Clip] = field(default_factory=dict)

    @cached_property
    def preview(self) -> LatentPreview:
        """Previews of this base's latents, fitted at the first use: ``models.preview(progress.latents)`` are images."""
        return LatentPreview(self.pipe)


def load_models(job: Job, before: JobModels | None = None) -> JobModels:
    """Return the models of ``job``, those of ``before`` where they are the same, with the job's addons on the base.

    ``before`` is used up: what the job does not need is released before anything is loaded. ValueError when weights are
    missing or damaged.
    """
    wanted = {item.saved.place: item.saved for item in job.adapters}
    states = {place: (saved, file_state(Path(place))) for place, saved in wanted.items()}
    names = {control.clip for variant in job.variants for control in optimized_controls(variant)}
    models = before or JobModels(job.base, job.device, None)
    same = (models.base, models.device) == (job.base, job.device)
    models.placed.keep(job.addons if same else Addons())
    if not same:
        vars(models).pop("preview", None)  # holds the VAE
        models.pipe, models.adapters, models.clips = None, {}, {}
        models = JobModels(job.base, job.device, None)
    models.adapters = {place: kept for place, kept in models.adapters.items() if states.get(place) == kept[0]}
    models.clips = {name: clip for name, clip in models.clips.items() if name in names}
    for place, saved in wanted.items():
        if place not in models.adapters:
            models.adapters[place] = states[place], saved.load().to(job.device).eval().requires_grad_(False)
    for name in sorted(names - models.clips.keys()):
        from localctl.weight_search.weights import clip_beside  # with the metrics, not needed otherwise

        models.clips[name] = clip_beside(name, resolve_base(job.base.name, one_file=True).id_or_path, job.device)
    if models.pipe is None:
        logger.info(f"loading the base {job.base.name} ...")
        models.pipe = load_pipeline(job.base, device=job.device)
    models.placed.place(job.addons, models.pipe, job.device)
    return models


def generate_job(
    job: Job, models: JobModels, on_step: Callable[[StepProgress], object] | None = None
) -> Iterator[tuple[Variant, GenerateOutput]]:
    """Generate the images of each variant of ``job`` in turn.

    on_step: called after every sampling step of every batch. An error that it raises, such as :class:`Cancelled`, ends
    the sampling there and leaves the models as they were.
    """
    options, count = job.options, job.image_count
    for index, variant in enumerate(job.variants):
        of = f" with {variant.label}" if len(job.variants) > 1 else ""
        logger.info(f"generating {count} image{'s'[: count - 1]}{of}, at most {options.batch_size} at once ...")
        watch = None if on_step is None else _watch(job, index, on_step)
        yield variant, generate_variant(job, variant, models, watch)


def _watch(job: Job, index: int, on_step: Callable[[StepProgress], object]) -> OnStep:
    """Return a function that makes a step of the variant with this ``index`` one of the job."""
    variant = job.variants[index]
    size = 1 if optimized_controls(variant) else job.options.batch_size
    epochs = next((control.epochs for control in optimized_controls(variant)), 0)
    finished, batches = 0, _batches(job, size)
    total = sum(len(images) for images, _ in batches)

    def report(step: SamplingStep) -> None:
        nonlocal finished
        images, second = batches[0]
        part = step.step / step.of
        share = (part * epochs if step.latents is None else epochs + part) / (epochs + 1)  # optimised first
        done = (index + (finished + len(images) * share) / total) / len(job.variants)
        on_step(StepProgress(step.step, step.of, images, variant, step.latents, done, second))
        if share == 1:
            finished += len(batches.pop(0)[0])

    return report


def _batches(job: Job, size: int) -> list[tuple[tuple[int, ...], bool]]:
    """Return the images that are generated at once, ``size`` at most, batch by batch, and whether in the second pass:
    layouts with other LoRAs are apart."""
    found, seeds = [], len(job.options.seeds)
    for _, layouts in job.addons.groups(len(job.layouts)):
        images = [layout * seeds + seed for layout in layouts for seed in range(seeds)]
        for second in (False, True) if job.second else (False,):
            found += [(tuple(images[first : first + size]), second) for first in range(0, len(images), size)]
    return found


def adapter_controls(
    adapters: Sequence[AdapterJob], models: JobModels, options: SampleSettings
) -> list[LocalAdapterControl]:
    """Return adapters as controls."""
    controls = []
    for index, item in enumerate(adapters):
        scales = item.weight, item.start, item.end, value_for(options, "unconditional_scale", index)
        adapter = models.adapters[item.saved.place][1]
        controls.append(
            LocalAdapterControl(adapter, item.condition, item.mask, *scales, options.control_guidance_scale)
        )
    return controls


def generate_variant(job: Job, variant: Variant, models: JobModels, on_step: OnStep | None = None) -> GenerateOutput:
    """Generate the images of one variant, with the adapters too; weights that are to be optimised are optimised for
    each image. The pipeline has its own scheduler again afterwards."""
    options = job.options
    sampling = Sampling.of(options).over(variant.sampling).over(job.own)
    sampling = replace(sampling, clip_skip=sampling.clip_skip or None)  # 0 skips nothing
    shared: Mapping[str, Any] = {
        "sampling": sampling, "negative_prompt": options.negative_prompt, "on_step": on_step
    }  # fmt: skip
    groups = job.addons.groups(len(job.layouts))
    found: dict[int, list[Any]] = {}
    for scales, indices in groups:
        models.placed.use(scales)
        output = _generate(job, models, variant, indices, shared)
        rows = zip(output.images, output.seeds, output.layouts, strict=True)
        found |= {index: [next(rows) for _ in options.seeds] for index in indices}
    if len(groups) == 1:
        return output
    images, seeds, layouts = zip(*(row for index in sorted(found) for row in found[index]), strict=True)
    return GenerateOutput(list(images), seeds, layouts)


def _generate(
    job: Job, models: JobModels, variant: Variant, indices: Sequence[int], shared: Mapping[str, Any]
) -> GenerateOutput:
    """Generate the images of the layouts with these indices, in one pass or two."""
    pipe = models.pipe
    assert pipe is not None

    def steered(of: Job | SecondPass) -> tuple[list[Layout], list[Control]]:
        addons = models.placed.controls(of.addons, indices)
        controls: list[Control] = [*adapter_controls(of.adapters, models, job.options), *addons, *variant.controls]
        return [of.layouts[index] for index in indices], controls

    layouts, controls = steered(job)
    for control in optimized_controls(variant):
        from localctl.weight_search.weights import generate_optimized

        return generate_optimized(pipe, layouts, controls, clip=models.clips[control.clip], **shared)
    if job.second is None:
        return generate(pipe, layouts, controls, init=job.init, **shared)
    first = generate(pipe, layouts, controls, init=job.init, output_type="latent", **shared)
    latents = denoiser_of(pipe).unpacked(torch.stack(list(first.images)), job.size)
    start = InitImage(_enlarged(latents, job.second.size, pipe.vae_scale_factor), job.second.strength)
    return generate(pipe, *steered(job.second), init=start, **shared)


def _enlarged(latents: Tensor, size: tuple[int, int], factor: int) -> list[Tensor]:
    """Return latents (n, c, h, w) interpolated for images of ``size``, each; ``factor``: pixels per latent."""
    grid = size[0] // factor, size[1] // factor
    return [torch.nn.functional.interpolate(item[None], size=grid, mode="bicubic")[0] for item in latents]
