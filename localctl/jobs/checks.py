"""Checks of a run against what its base can do: what it would ignore is refused before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import diffusers

from localctl.control.image_controls import check_control_guidance
from localctl.control.latents import check_shiftable_kind
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.presets import CONTROLS
from localctl.denoisers.abilities import ONLY_UNETS, Abilities
from localctl.image_to_image import check_task
from localctl.jobs.settings import SampleSettings
from localctl.jobs.variants import Variant
from localctl.layout import Layout
from localctl.pipelines import check_sigmas
from localctl.sampling_settings import Sampling
from localctl.schedulers import check_seedable

_ADDONS = {
    "controlnet": "ControlNets act",
    "ip_adapter": "IP-Adapters act in regions",
    "textual_inversion": "learned words are loaded",
}


def check_abilities(
    base: Abilities, options: SampleSettings, variants: Sequence[Variant], layouts: Sequence[Layout]
) -> None:
    """Raise a ValueError for settings or controls that a base would ignore, or cannot act on.

    ``options``: as given, before those that are left open are filled in.
    """
    base.check_settings(options)
    _check_controls(base, options, variants, layouts)
    if base.is_unet:
        return
    check_addons_act(base, options)
    if options.init_image or options.upscale is not None:
        check_task(getattr(diffusers, base.pipeline), repaints=bool(options.inpaint_mask))
    own = base.shape.parts["vae"].get("_class_name", "AutoencoderKL")
    if options.vae is not None and own != "AutoencoderKL":
        raise ValueError(f"--vae replaces an AutoencoderKL, and the base has an {own}; leave it out.")


def check_addons_act(base: Abilities, options: Any) -> None:
    """Raise a ValueError for addons, by the names of their settings, that do not act on a base."""
    for addon, what in _ADDONS.items():
        if getattr(options, addon) and not base.is_unet:
            raise ValueError(f"--{addon}: {what} {ONLY_UNETS}, not on a {base.family.name}; leave it out.")
    if options.lora and not hasattr(getattr(diffusers, base.pipeline), "lora_state_dict"):
        raise ValueError(f"--lora: diffusers loads no LoRAs on a {base.pipeline}; leave it out.")


def _check_controls(
    base: Abilities, options: SampleSettings, variants: Sequence[Variant], layouts: Sequence[Layout]
) -> None:
    phrases = any(region.phrase for layout in layouts for region in layout.regions)
    for variant in variants:
        chosen, spacing = options.scheduler or variant.sampling.scheduler, Sampling.of(options).sigmas
        # A U-Net's own scheduler may not be here yet, and is checked when it is.
        kind = None if base.is_unet and chosen is None and spacing is None else base.scheduler(chosen)
        check_seedable(kind or "", base.pipeline)
        if spacing is not None:
            check_sigmas(kind, spacing)
        names = {CONTROLS.name_of(type(control)) for control in variant.controls}
        if "guidance" in names and kind is not None:
            check_shiftable_kind(kind)
        if "spacetime_optimized" in names and "FlowMatch" in (kind or ""):
            raise ValueError(
                f"spacetime_optimized optimises weights through DDIM or PNDM, and a {base.pipeline} samples by flow "
                "matching; use spacetime."
            )
        guided = base.guidance.is_on(Sampling.of(options).over(variant.sampling).over(base.sampling))
        if not guided and any(isinstance(control, NegativePrompts) for control in variant.controls):
            raise ValueError(
                f"Negative prompts of regions do nothing without guidance; {base.guidance.way_on()}, or leave them out "
                "of the layout, or with --region_negatives false."
            )
        if names and phrases:
            base.family.check_located(base.pipeline)
    if options.control_guidance_scale is not None:
        base.check_own_guidance()


def check_numbers(options: SampleSettings) -> None:
    """Raise a ValueError for numbers out of range, or a seed that is given twice."""
    for name in ("num_inference_steps", "batch_size", "save_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}.")
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError("A seed is given twice in --seeds; give each one once.")
    if not all(map(math.isfinite, [options.guidance_scale or 0.0, *options.weight])):
        raise ValueError("--guidance_scale and --weight must be finite numbers.")
    for scale in options.unconditional_scale or (None,):
        check_control_guidance(scale, options.control_guidance_scale)
    for name in ("controlnet_scale", "ip_adapter_scale", "lora_scale"):
        if not all(map(math.isfinite, getattr(options, name))):
            raise ValueError(f"--{name} must be finite numbers.")
    if not 0 <= (options.guidance_rescale or 0.0) <= 1:
        raise ValueError(f"--guidance_rescale must be between 0 and 1, not {options.guidance_rescale}.")
    Sampling.of(options)  # ValueError for others out of range
