"""From the settings of ``sample.py`` to a job: everything looked up and checked, no model loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import BaseShape, read_shape
from localctl.bases import SchedulerName, check_vae, lasting_name
from localctl.control.compatible import check_base
from localctl.denoisers.abilities import Abilities
from localctl.denoisers.configs import Guidance
from localctl.distributed import process_device
from localctl.image_to_image import InitImage
from localctl.jobs.addons import Addons, check_addons, controlnet_sources, find_addons, prepare_addons
from localctl.jobs.checks import check_abilities, check_numbers
from localctl.jobs.inputs import (
    AdapterJob,
    Size,
    check_same_aspect_ratio,
    choose_size,
    prepare_inputs,
    read_sources,
    size_multiple,
    with_level_weights,
)
from localctl.jobs.settings import AUTO, SampleSettings
from localctl.jobs.starts import SecondPass, check_save_steps, fit_init, read_init, second_size
from localctl.jobs.variants import (
    Variant,
    acting_presets,
    has_negatives,
    load_layouts,
    optimized_controls,
    plan,
    with_negatives,
)
from localctl.layout import Layout, texts_of
from localctl.pipelines import BaseConfig, resolve_base
from localctl.prompt_syntax import warn_of_syntax
from localctl.prompt_weights import check_prompt, refuse_weights
from localctl.sampling_settings import FREE, Sampling
from localctl.sizes import check_side

_WITHOUT_DEFAULT = (
    *("image", "condition_image", "mask", "condition", "condition_model", "condition_detector", "level_weights"),
)
_OF_ADAPTERS = (*_WITHOUT_DEFAULT, "weight", "start", "end", "unconditional_scale")


@dataclass(frozen=True)
class Job:
    """Everything a run needs.

    options: the settings that reproduce it. variants: the controls to generate all images with, in turn. size:
    (height, width) of the images in pixels, before a second pass. init: the image to start from, if any. second: the
    second pass, if any. notes: sentences for the user, on what may be unexpected. own: what suits the base, where
    neither options nor variant say.
    """

    layouts: list[Layout]
    adapters: list[AdapterJob]
    base: BaseConfig
    device: torch.device
    options: SampleSettings
    variants: list[Variant]
    size: Size
    notes: list[str]
    addons: Addons = Addons()
    init: InitImage | None = None
    second: SecondPass | None = None
    own: Sampling = FREE

    @property
    def image_count(self) -> int:
        """The number of images of each variant."""
        return len(self.layouts) * len(self.options.seeds)


def prepare(options: SampleSettings) -> Job:
    """Check everything that can be checked without loading a model, and return the job. ValueError in one sentence."""
    notes = _clean_texts(options)
    layouts = load_layouts(options)
    check_numbers(options)
    _check_counts(options)
    found = find_addons(options)
    device = process_device(options.device)
    saved = [find_adapter(path, bool(options.local_files_only)) for path in options.adapter or ()]
    base = _base_config(options, saved)
    variants = plan(options, base.name)
    if has_negatives(layouts):
        variants, ignored = with_negatives(variants, options)
        notes += ignored
    shape = read_shape(base)
    known = Abilities(base, shape)
    _check_prompts(options, layouts, known)
    check_abilities(known, options, variants, layouts)
    _fill_sampling(options, variants, known)
    _check_channels(base, shape)
    check_addons(found, shape, layouts or [Layout(prompt) for prompt in options.prompt or ()], options.negative_prompt)
    sources, of_nets = read_sources(options, saved), controlnet_sources(options, found)
    init = read_init(options, variants)
    notes += [note for adapter in saved if (note := check_base(adapter, base.name, shape))]
    notes += _check_sampling(options, variants, known)
    options.unconditional_scale = options.unconditional_scale or _own_scales(options, saved, known.guidance)
    followed: list[Any] = [*sources, *of_nets, *([init] if init else [])]
    asked, multiple = _requested_size(options, layouts), size_multiple(saved, known.multiple)
    needed_by = "base" if multiple == size_multiple((), known.multiple) else "adapter"
    size = choose_size(asked, followed[0].size if followed else None, known.size, multiple, needed_by)
    if None in asked:
        check_same_aspect_ratio(followed)
    size_chosen = asked == (None, None) and bool(followed) and followed[0].size != size
    why = ", the base's own area (--resolution, or --height and --width, choose another)" if size_chosen else ""
    options.height, options.width, options.resolution = *_recorded_size(options, bool(followed), size), None
    layouts = layouts or [Layout(prompt) for prompt in options.prompt or ()]

    def fitted(size: Size, why: str = "") -> tuple[tuple[list[Layout], list[AdapterJob], Addons], list[str]]:
        of_size = [replace(layout, height=size[0], width=size[1]) for layout in layouts]
        adapters, scaled = prepare_inputs(options, saved, sources, size, why)
        addons, more = prepare_addons(options, found, of_nets, of_size, size, why)
        return (of_size, with_level_weights(options, adapters), addons), [*scaled, *more]

    (of_size, adapters, addons), scaled = fitted(size, why)
    if init is not None:
        init, more = fit_init(init, options, size, why)
        scaled = list(dict.fromkeys([*scaled, *more]))
    large = second_size(options, variants, size, multiple)
    check_save_steps(options)
    second = SecondPass(large, *fitted(large)[0], options.upscale_strength or 0.0) if large else None
    own = known.sampling
    return Job(of_size, adapters, base, device, options, variants, size, [*notes, *scaled], addons, init, second, own)


def _clean_texts(options: SampleSettings) -> list[str]:
    """Replace characters that are not valid Unicode, as of a terminal in another encoding, by question marks. Return
    notes on them, and on the seed -1, which other programs take for a random one."""
    notes = []
    for name in ("prompt", "negative_prompt"):
        value = getattr(options, name)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        if clean != texts:
            setattr(options, name, clean if isinstance(value, list) else clean[0])
            notes.append(f"--{name} has characters that are not valid Unicode; they are read as question marks.")
    if -1 in options.seeds:
        notes.append("The seed -1 is a seed like any other, not a random one.")
    return notes


def _check_prompts(options: SampleSettings, layouts: Sequence[Layout], base: Abilities) -> None:
    """Raise a ValueError for a prompt whose marks cannot act; warn of marks that are read as text."""
    texts = [*(options.prompt or ()), options.negative_prompt, *texts_of(layouts)]
    prompts = list(dict.fromkeys(filter(None, texts)))
    if options.prompt_weighting is False:
        return warn_of_syntax(prompts)
    if not base.is_unet:
        refuse_weights(base.family.name, prompts, options.prompt_weighting)
    for prompt in prompts:
        check_prompt(prompt)


def _base_config(options: SampleSettings, adapters: Sequence[SavedAdapter]) -> BaseConfig:
    """Return the base of ``--base``, else that of the first adapter that names one. ValueError when it is not there."""
    name = options.base
    if name is None and adapters:
        adapter = next((adapter for adapter in adapters if adapter.base), None)
        if adapter is None or adapter.base is None:
            raise ValueError("The adapter does not say which base it was trained on; give --base.")
        name = adapter.base
        try:
            resolve_base(name, one_file=True)
        except ValueError as error:
            raise ValueError(
                f"There is no base {name!r} here, on which the adapter {adapter.name} was trained; give --base."
            ) from error
    return BaseConfig(
        name=name or "micro",
        vae=options.vae,
        revision=options.revision,
        variant=options.variant,
        dtype=options.dtype,
        local_files_only=bool(options.local_files_only),
    )


def _check_channels(base: BaseConfig, shape: BaseShape) -> None:
    """Raise a ValueError for a base that reads more than latents, such as one for inpainting. Of transformers, those
    have pipelines of their own, which are not supported."""
    if shape.denoiser != "unet":
        return
    own, latents = shape.parts["unet"].get("in_channels", 4), shape.parts["vae"].get("latent_channels", 4)
    if own != latents:
        raise ValueError(
            f"The base {base.name} reads {own} channels, as bases for inpainting or editing do, and its latents have "
            f"{latents}; choose a base that generates images from text, which repaints, too (--inpaint_mask)."
        )


def _fill_sampling(options: SampleSettings, variants: Sequence[Variant], base: Abilities) -> None:
    """Write guidance and scheduler into the options where all variants share them, so that the record repeats the run
    even if a default changes."""
    scales = {variant.sampling.guidance_scale or base.guidance.scale for variant in variants}
    schedulers = {variant.sampling.scheduler for variant in variants}
    if options.guidance_scale is None and len(scales) == 1:
        options.guidance_scale = scales.pop()
    if options.scheduler is None and len(schedulers) == 1:
        options.scheduler = cast(SchedulerName, schedulers.pop())
    if options.true_cfg_scale is None:
        options.true_cfg_scale = base.guidance.true_cfg_scale
    if options.negative_prompt is None and base.guidance.is_on(options):
        options.negative_prompt = base.guidance.negative_prompt
    options.presets = acting_presets(variants, options, base.guidance.scale) if options.layout else None


def _own_scales(options: SampleSettings, adapters: Sequence[SavedAdapter], guidance: Guidance) -> list[float]:
    """Return the adapters' own factors of their features beside the negative prompt, for the record: 1 where they have
    no effect, one value for all where they agree."""
    guided = _open_scale(options, guidance) or guidance.is_on(options)
    used = guided and options.control_guidance_scale is None
    scales = [adapter.unconditional_scale if used else 1.0 for adapter in adapters]
    return scales if len(set(scales)) > 1 else scales[:1] or [1.0]


def _open_scale(options: SampleSettings, guidance: Guidance) -> bool:
    """Return whether variants have guidance scales of their own, which are not written into the options."""
    return guidance.by == "guidance_scale" and options.guidance_scale is None


def _check_sampling(options: SampleSettings, variants: Sequence[Variant], base: Abilities) -> list[str]:
    """Raise a ValueError for a sampling setting that this run cannot use; return a note on one without effect."""
    shape, guidance = base.shape, base.guidance
    if any(map(optimized_controls, variants)):
        for name in ("clip_skip", "guidance_rescale", "control_guidance_scale"):
            if getattr(options, name):
                raise ValueError(f"--{name} does not go together with spacetime_optimized; use spacetime.")
    if options.guidance_rescale and not shape.xl and (options.init_image or options.upscale):
        raise ValueError(
            "--guidance_rescale works with --init_image and --upscale on SDXL only; leave it out on other bases."
        )
    without = not _open_scale(options, guidance) and not guidance.is_on(options)
    if without:
        for name, wanted in (
            ("unconditional_scale", bool({*(options.unconditional_scale or ())} - {1.0})),
            ("guidance_rescale", bool(options.guidance_rescale)),
        ):
            if wanted:
                raise ValueError(f"--{name} does nothing without guidance; {guidance.way_on()}.")
    encoders = [shape.parts[part] for part in shape.parts if part.startswith("text")]
    layers = min(encoder.get("num_hidden_layers", 12) for encoder in encoders)
    most = layers - ("text_encoder_2" in shape.parts)  # SDXL and SD3 read the last but one layer without a skip
    if options.clip_skip is not None and not 0 <= options.clip_skip <= most:
        raise ValueError(
            f"--clip_skip must be a whole number from 0 to {most} with this base, not {options.clip_skip}."
        )
    check_vae(base.base, shape.parts["vae"])
    if options.negative_prompt and without:
        return [f"--negative_prompt does nothing with a --{guidance.by} of {guidance.above:g} or less."]
    return []


def _requested_size(options: SampleSettings, layouts: Sequence[Layout]) -> tuple[int | None, int | None]:
    """Return the (height, width) that flags or layouts ask for, None for a side left open. ValueError for layouts of
    different sizes, or of another size than the flags'."""
    if options.resolution is not None and (options.height, options.width) != (None, None):
        raise ValueError("Give either --resolution or --height and --width, not both.")
    height, width = options.resolution or (options.height, options.width)
    for name, side in (("height", height), ("width", width)):
        check_side(name, side)
    sizes = {layout.size for layout in layouts if layout.size is not None}
    if len(sizes) > 1:
        raise ValueError(f"The layouts have several sizes, {' and '.join(f'{w}x{h}' for h, w in sorted(sizes))}.")
    if not sizes:
        return height, width
    of_layout = sizes.pop()
    asked = (height or of_layout[0], width or of_layout[1])
    if asked != of_layout:
        raise ValueError(
            f"The layout is {of_layout[1]}x{of_layout[0]} pixels but the flags ask for {asked[1]}x{asked[0]}; "
            "change the flags, or leave the size out of the layout."
        )
    return of_layout


def _recorded_size(options: SampleSettings, follows: bool, size: Size) -> tuple[int | None, int | None]:
    """Return the size for the record: (None, None) where layout or base determine it."""
    free = options.resolution is None and options.height is None and options.width is None
    return (None, None) if free and not follows else size


def _check_counts(options: SampleSettings) -> None:
    """Raise a ValueError for flags of adapters without an adapter, for an adapter without an image, or for another
    number of values than adapters."""
    if not options.adapter:
        for name, without in (("control_guidance_scale", (None,)), ("unconditional_scale", (None, [1.0]))):
            if getattr(options, name) not in without:
                raise ValueError(f"--{name} is for an adapter, but there is none; give --adapter.")
        for name in _WITHOUT_DEFAULT:
            if getattr(options, name):
                raise ValueError(f"--{name} is for an adapter, but there is none; give --adapter.")
        return
    if options.image and options.condition_image:
        raise ValueError("Give either --image or --condition_image, not both.")
    if not options.image and not options.condition_image:
        raise ValueError("The adapter has no image to follow; give --image or --condition_image.")
    for name in _OF_ADAPTERS:
        count = len(getattr(options, name) or [None])
        if count not in (1, len(options.adapter)):
            raise ValueError(f"--{name} has {count} values for {len(options.adapter)} adapters; give one, or one each.")


def _model_places(options: SampleSettings) -> dict[str, list[str] | None]:
    """Return the settings that name models of conditions, with absolute paths."""
    found: dict[str, list[str] | None] = {}
    for name in (f"{prefix}condition_{what}" for prefix in ("", "controlnet_") for what in ("model", "detector")):
        places = [(place, Path(place).expanduser()) for place in getattr(options, name) or ()]
        found[name] = [str(path.resolve()) if place and path.exists() else place for place, path in places] or None
    return found


def reproducing_options(job: Job) -> dict[str, Any]:
    """Return the settings that repeat this run from any folder: with the adapter's defaults and absolute paths."""
    return {
        **vars(job.options),
        "from_json": None,
        "base": lasting_name(job.base.name),
        "vae": job.base.vae and lasting_name(job.base.vae),
        "adapter": [item.saved.place for item in job.adapters] or None,
        **job.addons.recorded(),
        **_model_places(job.options),
        "layout": [AUTO if path == AUTO else str(Path(path).resolve()) for path in job.options.layout or ()] or None,
    }
