"""Sampling with controls: ``attach`` them to a stock diffusers pipeline, or ``generate`` pictures seed by seed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from localctl.control.base import CallContext, Control, add_residuals
from localctl.layout import Layout, as_layouts
from localctl.random import generator, noise

Layouts = Layout | str | Sequence[Layout | str]

# These schedulers draw one noise for the whole batch from a seed of their own, out of reach of the pictures' seeds.
_OWN_NOISE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
_OURS = ("prompt", "prompt_embeds", "latents", "generator", "num_images_per_prompt", "return_dict")
_PER_LAYOUT = ("negative_prompt", "prompt_2", "negative_prompt_2")


@contextmanager
def attach(pipe: DiffusionPipeline, layout: Layouts, controls: Control | Sequence[Control]) -> Iterator[Attachment]:
    """Steer the calls of ``pipe`` with ``controls``; everything is put back at the end, also after an exception.

    Only calls of ``pipe`` itself are steered: another pipeline, or a loop of your own, that uses the same U-Net runs
    as if nothing were attached. Attaching twice to one pipeline adds up.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline (anything with ``unet``, ``scheduler`` and ``encode_prompt``).
        layout: a layout, a prompt, or a list of either. ``pipe`` must then be called with the very prompts of the
            layouts, in their order (or, for one layout, any number of times its prompt); embeddings given in place of
            prompts are taken at their word.
        controls: one control or several; what they add to the U-Net is summed.

    Raises:
        ValueError: at once if the controls do not fit the layouts; when ``pipe`` is called, if prompt or size are not
            the layout's, or a condition does not fit the picture or the U-Net.
    """
    missing = [name for name in ("unet", "scheduler", "encode_prompt") if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(f"{type(pipe).__name__} has no {missing[0]}; attach to a Stable Diffusion 1.x, 2.x or XL one.")
    attachment = Attachment(pipe, as_layouts(layout), [controls] if isinstance(controls, Control) else controls)
    hook = pipe.unet.register_forward_pre_hook(attachment.before_unet, with_kwargs=True)
    try:
        with (
            _wrapped(pipe, "encode_prompt", before=attachment.begin_call),
            # The last thing every pipeline does, on success; after an error the next call begins anew.
            _wrapped(pipe, "maybe_free_model_hooks", before=attachment.end_call),
        ):
            yield attachment
    finally:
        hook.remove()


class Attachment:
    """The controls on one pipeline, while they are attached."""

    def __init__(self, pipe: DiffusionPipeline, layouts: Sequence[Layout], controls: Sequence[Control]) -> None:
        self.pipe = pipe
        self.layouts = tuple(layouts)
        self.bound = [control.bind(pipe, self.layouts) for control in controls]
        self._selected: tuple[int, ...] | None = None
        self._layout_of_image: tuple[int, ...] | None = None  # of the running call; None between calls

    def select(self, indices: Sequence[int] | None) -> None:
        """The next calls draw these layouts, one index per prompt; None = all of them, in order."""
        assert indices is None or all(0 <= index < len(self.layouts) for index in indices)
        self._selected = None if indices is None else tuple(indices)

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        """Take the layout of each picture from what ``encode_prompt`` is given, the first thing a pipeline calls."""
        self._layout_of_image = None
        prompt = arguments["prompt"]
        if prompt is None:  # then there are embeddings; the pipeline has checked that
            drawn = self._drawn(len(arguments["prompt_embeds"]))
            prompts = [self.layouts[index].prompt for index in drawn]
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            drawn = self._drawn(len(prompts))
        for given, index in zip(prompts, drawn, strict=True):
            if given != self.layouts[index].prompt:
                raise ValueError(
                    f"The pipeline was called with the prompt {given!r} while the attached layout says "
                    f"{self.layouts[index].prompt!r}; call it with layout.prompt."
                )
        copies = arguments.get("num_images_per_prompt") or 1
        self._layout_of_image = tuple(index for index in drawn for _ in range(copies))  # as repeat_interleave

    def end_call(self, arguments: Mapping[str, Any]) -> None:
        """From here on, calls of the U-Net are none of ours."""
        self._layout_of_image = None

    def _drawn(self, prompts: int) -> tuple[int, ...]:
        """The index of the layout of each of the prompts."""
        if self._selected is not None and len(self._selected) == prompts:
            return self._selected
        if self._selected is None and prompts == len(self.layouts):
            return tuple(range(prompts))
        if self._selected is None and len(self.layouts) == 1:
            return (0,) * prompts
        expected = len(self.layouts if self._selected is None else self._selected)
        raise ValueError(f"The pipeline was called with {prompts} prompts for {expected} layouts; give each one.")

    def before_unet(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: adds what the controls want to the arguments of this call."""
        if self._layout_of_image is None:
            return None
        sample = args[0] if args else kwargs["sample"]  # (R, 4, h, w)
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        context = self._context(unet, sample, timestep, self._layout_of_image)
        added: list[Tensor] | None = None
        for control in self.bound:
            added = add_residuals(added, control.down_residuals(context))
        if added is None:
            return None
        name = "down_intrablock_additional_residuals"
        return args, {**kwargs, name: add_residuals(kwargs.get(name), added)}

    def _context(self, unet: nn.Module, sample: Tensor, timestep: Any, layout_of_image: tuple[int, ...]) -> CallContext:
        rows, images = sample.shape[0], len(layout_of_image)
        if rows not in (images, 2 * images):
            raise ValueError(
                f"The U-Net was called with {rows} rows for {images} pictures; controls work with plain sampling or "
                "classifier-free guidance, not with methods that add rows of their own."
            )
        guided = rows == 2 * images  # [negative; positive], each one row per picture
        time = float(torch.as_tensor(timestep).flatten()[0])
        step, num_steps = outer_step(self.pipe.scheduler, time)
        height, width = sample.shape[-2:]
        factor = self.pipe.vae_scale_factor
        image_size = (height * factor, width * factor)
        for layout in self.layouts:
            if layout.size not in (None, image_size):
                raise ValueError(
                    f"The pipeline draws {image_size[1]}x{image_size[0]} pixels but the layout is "
                    f"{layout.width}x{layout.height}; pass height and width of the layout."
                )
        return CallContext(
            step=step,
            num_steps=num_steps,
            timestep=time,
            layout_of_row=layout_of_image * (2 if guided else 1),
            conditional=(False,) * (images if guided else 0) + (True,) * images,
            latent_size=(height, width),
            image_size=image_size,
            device=sample.device,
            dtype=unet.dtype,
        )


def outer_step(scheduler: Any, timestep: float) -> tuple[int, int]:
    """Which of the outer sampling steps ``timestep`` belongs to, and how many there are.

    Second-order schedulers visit two timesteps in one step, and Heun visits each twice: then ``step_index``, where the
    scheduler keeps one, tells the visits apart. ValueError for a timestep that is not on the schedule.
    """
    times = torch.as_tensor(scheduler.timesteps).double().cpu()
    found = (times == timestep).nonzero().flatten().tolist()
    if not found:
        raise ValueError(f"The U-Net was called at timestep {timestep}, which is not on the pipeline's schedule.")
    index: Any = getattr(scheduler, "step_index", None)
    position: int = index if index in found else found[0]
    order: int = getattr(scheduler, "order", 1)
    if order > 1:
        return position // order, -(-len(times) // order)
    # PNDM repeats a timestep while it warms up. If it starts with Runge-Kutta, it has half steps as well, and the
    # count below is out by one at most.
    distinct = torch.unique_consecutive(times)
    position = int((distinct == timestep).nonzero()[0])
    num_steps = min(scheduler.num_inference_steps or len(distinct), len(distinct))
    return position * num_steps // len(distinct), num_steps


@contextmanager
def _wrapped(instance: Any, name: str, before: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Call ``before`` with the bound arguments ahead of each call of a method, on this instance only."""
    method, own = getattr(instance, name), vars(instance).get(name)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        before(bound.arguments)
        return method(*args, **kwargs)

    setattr(instance, name, wrapper)
    try:
        yield
    finally:
        if own is None:
            delattr(instance, name)
        else:
            setattr(instance, name, own)


@dataclass(frozen=True)
class GenerateOutput:
    """Pictures, one per layout and seed, layout by layout; ``seeds`` and ``layouts`` name each picture's."""

    images: list[Any]
    seeds: tuple[int, ...]
    layouts: tuple[Layout, ...]


def generate(
    pipe: DiffusionPipeline,
    layout: Layouts,
    controls: Control | Sequence[Control] = (),
    seeds: int | Sequence[int] = (0,),
    *,
    batch_size: int = 4,
    paired: bool = False,
    **pipeline_arguments: Any,
) -> GenerateOutput:
    """Draw every layout with every seed, or, ``paired``, each layout with its own seed.

    All noise of a picture, the first and that of stochastic schedulers, comes from its own seed alone: it is the same
    whatever the batch size, the other pictures, the device or the dtype (up to rounding to that dtype).

    Args:
        pipe: a stock text-to-image pipeline, Stable Diffusion 1.x, 2.x or XL.
        layout: a layout, a prompt, or a list of either; all of one size.
        controls: as for :func:`attach`.
        seeds: one seed or several.
        batch_size: at most this many pictures at once.
        paired: as many seeds as layouts, and picture i is layout i drawn with seed i.
        pipeline_arguments: passed on to ``pipe``. ``negative_prompt``, ``prompt_2`` and ``negative_prompt_2`` may be
            one text for all layouts or a list with one per layout.

    Raises:
        ValueError: an argument that this function sets itself, sizes that differ, or as for :func:`attach`.
    """
    layouts = as_layouts(layout)
    seeds = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    _check_generate(pipe, seeds, batch_size, pipeline_arguments)
    height, width = _image_size(pipe, layouts, pipeline_arguments)
    texts = {name: _per_layout(name, pipeline_arguments.pop(name, None), len(layouts)) for name in _PER_LAYOUT}
    pictures = [(index, seed) for index in range(len(layouts)) for seed in seeds]
    if paired:
        if len(seeds) != len(layouts):
            raise ValueError(f"There are {len(seeds)} seeds for {len(layouts)} layouts; paired needs one each.")
        pictures = list(enumerate(seeds))
    images: list[Any] = []
    with attach(pipe, layouts, controls) as attached:
        for first in range(0, len(pictures), batch_size):
            batch = pictures[first : first + batch_size]
            attached.select([index for index, _ in batch])
            output = pipe(
                prompt=[layouts[index].prompt for index, _ in batch],
                height=height,
                width=width,
                latents=torch.cat([initial_noise(pipe, seed, height, width) for _, seed in batch]),
                generator=[generator(seed, "steps") for _, seed in batch],
                **{name: [text[index] for index, _ in batch] for name, text in texts.items() if text is not None},
                **pipeline_arguments,
            )
            images.extend(output.images)
    return GenerateOutput(images, tuple(seed for _, seed in pictures), tuple(layouts[index] for index, _ in pictures))


def initial_noise(pipe: DiffusionPipeline, seed: int, height: int, width: int) -> Tensor:
    """The noise a picture starts from: standard normal (1, C, h, w); the pipeline scales it for its scheduler."""
    factor = pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, height // factor, width // factor)
    return noise(shape, seed, "latents", dtype=pipe.unet.dtype)


def _check_generate(
    pipe: DiffusionPipeline, seeds: Sequence[int], batch_size: int, pipeline_arguments: Mapping[str, Any]
) -> None:
    if not seeds:
        raise ValueError("There is no seed; give at least one.")
    if batch_size < 1:
        raise ValueError(f"The batch size must be at least 1, not {batch_size}.")
    for name in _OURS:
        if name in pipeline_arguments:
            raise ValueError(f"generate sets {name!r} itself from layouts and seeds; call the pipeline inside attach.")
    if type(pipe.scheduler).__name__ in _OWN_NOISE:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} draws noise that the seeds cannot set; "
            "use DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'."
        )


def _image_size(pipe: DiffusionPipeline, layouts: Sequence[Layout], arguments: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels: the layouts', or those in ``arguments`` (taken out), or the base's own."""
    asked = Layout("", arguments.pop("height", None), arguments.pop("width", None))  # checks the two
    sizes = {item.size for item in (*layouts, asked) if item.size is not None}
    if len(sizes) > 1:
        raise ValueError(f"Sizes (height, width) differ: {', '.join(map(str, sorted(sizes)))}; draw one size per call.")
    if sizes:
        return sizes.pop()
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def _per_layout(name: str, value: str | Sequence[str] | None, count: int) -> list[str] | None:
    if value is None or isinstance(value, str):
        return None if value is None else [value] * count
    if len(value) != count:
        raise ValueError(f"There are {len(value)} texts in {name} for {count} layouts; give one for all or one each.")
    return list(value)
