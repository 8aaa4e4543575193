"""What the base of a run can do, by its configs: what it would ignore is refused before it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers

from localctl.architectures import BaseShape
from localctl.control.latents import check_shiftable_kind
from localctl.control.own_guidance import check_one_call
from localctl.control.presets import CONTROLS
from localctl.denoisers import family_of
from localctl.denoisers.base import Denoiser
from localctl.denoisers.configs import Guidance
from localctl.image_to_image import check_task
from localctl.jobs.settings import SampleSettings
from localctl.jobs.variants import Variant
from localctl.layout import Layout
from localctl.pipelines import BaseConfig, check_sigmas, choose_pil_processors, resolve_base, scheduler_of
from localctl.sampling import check_seedable
from localctl.sampling_settings import Sampling

_UNET_ARGUMENTS = ("negative_prompt", "clip_skip", "guidance_rescale")
_OF_THE_PIPELINE = (*_UNET_ARGUMENTS, "true_cfg_scale", "max_sequence_length")
_ADDONS = {
    "controlnet": "ControlNets act",
    "ip_adapter": "IP-Adapters act in regions",
    "lora": "LoRAs are loaded",
    "textual_inversion": "learned words are loaded",
}
_ONLY_UNETS = "on Stable Diffusion 1.x, 2.x and XL only"


@dataclass(frozen=True)
class Abilities:
    """What a base can do."""

    base: BaseConfig
    shape: BaseShape

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config of its denoiser."""
        return self.shape.parts[self.shape.denoiser]

    @cached_property
    def family(self) -> type[Denoiser]:
        """The family of its denoiser."""
        return family_of(self.config)

    @property
    def is_unet(self) -> bool:
        """Whether its denoiser is a U-Net."""
        return self.shape.denoiser == "unet"

    @property
    def pipeline(self) -> str:
        """The name of its pipeline's class."""
        own = "StableDiffusionXLPipeline" if self.shape.xl else "StableDiffusionPipeline"
        return str(self.shape.index.get("_class_name", own))

    @cached_property
    def arguments(self) -> Sequence[str]:
        """The arguments that a call of its pipeline takes; of a U-Net's, those of ``_OF_THE_PIPELINE``."""
        if self.is_unet:
            return _UNET_ARGUMENTS
        choose_pil_processors()
        return tuple(inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters)

    @cached_property
    def guidance(self) -> Guidance:
        """How it is guided."""
        if self.is_unet:
            return Guidance(resolve_base(self.base.name, one_file=True).guidance_scale)
        return self.family.guidance(self.config, self.shape.index)

    @property
    def sampling(self) -> Sampling:
        """The settings of sampling that suit it, where none are given."""
        return Sampling(guidance_scale=self.guidance.scale, true_cfg_scale=self.guidance.true_cfg_scale)

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) in pixels that it was trained at."""
        return self.family.size_of(self.config, self.shape.vae_scale_factor)

    @property
    def multiple(self) -> int:
        """The pixels that height and width must be multiples of."""
        return self.family.multiple_of(self.config, self.shape.vae_scale_factor)

    def scheduler(self, name: str | None) -> str | None:
        """Return the class of the scheduler ``name`` (None: its own); None if its files are not here. ValueError for a
        scheduler that is not for it."""
        return scheduler_of(self.base, name, self.pipeline)


def check_abilities(
    base: Abilities, options: SampleSettings, variants: Sequence[Variant], layouts: Sequence[Layout]
) -> None:
    """Raise a ValueError for settings or controls that a base would ignore, or cannot act on.

    ``options``: as given, before those that are left open are filled in.
    """
    _check_arguments(base, options)
    _check_controls(base, options, variants, layouts)
    if base.is_unet:
        return
    for addon, what in _ADDONS.items():
        if getattr(options, addon):
            way_out = "; load it in Python, by pipe.load_lora_weights" if addon == "lora" else "; leave it out"
            raise ValueError(f"--{addon}: {what} {_ONLY_UNETS}, not on a {base.family.name}{way_out}.")
    if options.init_image or options.upscale is not None:
        check_task(getattr(diffusers, base.pipeline), repaints=bool(options.inpaint_mask))
    own = base.shape.parts["vae"].get("_class_name")
    if options.save_steps is not None and own != "AutoencoderKL":
        raise ValueError(f"--save_steps writes previews, which the latents of an {own} do not have; leave it out.")
    if options.vae is not None and own != "AutoencoderKL":
        raise ValueError(f"--vae replaces an AutoencoderKL, and the base has an {own}; leave it out.")


def _check_arguments(base: Abilities, options: SampleSettings) -> None:
    for name in _OF_THE_PIPELINE:
        value = getattr(options, name)
        if name not in base.arguments and value is not None and (value or name == "max_sequence_length"):
            raise ValueError(f"A {base.pipeline} takes no {name}; leave --{name} out.")
    if options.guidance_scale is not None and base.guidance.scale is None:
        instead = "give --true_cfg_scale in place of it" if base.guidance.by == "true_cfg_scale" else "leave it out"
        raise ValueError(f"The base {base.base.name} ignores --guidance_scale; {instead}.")


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
        if names and phrases:
            base.family.check_located(base.pipeline)
    if options.control_guidance_scale is not None:
        check_one_call(base.family, base.is_unet or hasattr(getattr(diffusers, base.pipeline), "guidance_scale"))
