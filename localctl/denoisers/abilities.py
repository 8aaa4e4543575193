"""What a base can do, by its configs, before it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import diffusers

from localctl.architectures import BaseShape
from localctl.bases import SCHEDULERS, has_part
from localctl.denoisers import family_of
from localctl.denoisers.base import Denoiser
from localctl.denoisers.configs import Guidance
from localctl.pipelines import BaseConfig, choose_pil_processors, resolve_base, scheduler_of
from localctl.sampling_settings import Sampling, check_stated, own_sampling
from localctl.schedulers import check_seedable

ONLY_UNETS = "on Stable Diffusion 1.x, 2.x and XL only"
_UNET_ARGUMENTS = ("negative_prompt", "clip_skip", "guidance_rescale")
_OF_THE_PIPELINE = (*_UNET_ARGUMENTS, "true_cfg_scale")


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
    def arguments(self) -> Mapping[str, Any]:
        """The arguments that a call of its pipeline takes, with their defaults; of a U-Net's, some by name."""
        if self.is_unet:
            return dict.fromkeys(_UNET_ARGUMENTS)
        choose_pil_processors()
        signature = inspect.signature(getattr(diffusers, self.pipeline).__call__)
        return {name: parameter.default for name, parameter in signature.parameters.items()}

    @cached_property
    def guidance(self) -> Guidance:
        """How it is guided."""
        own = own_sampling(self.base.name)
        if self.is_unet:
            usual = resolve_base(self.base.name, one_file=True).guidance_scale
            return Guidance(usual if own.guidance_scale is None else own.guidance_scale)
        found = self.family.guidance(self.config, self.shape.index)
        if found.scale is None:
            check_stated(self.base.name)
        if found.true_cfg_scale is not None and own.true_cfg_scale is not None:
            return replace(found, true_cfg_scale=own.true_cfg_scale)
        if found.scale is None or own.guidance_scale is None:
            return found
        return replace(found, scale=own.guidance_scale)

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

    @cached_property
    def is_flow(self) -> bool:
        """Whether it samples by flow matching."""
        return "FlowMatch" in (self.scheduler(None) or "")

    @property
    def schedulers(self) -> list[str]:
        """The names of the schedulers that it takes, and whose noise seeds can set."""
        return [name for name in SCHEDULERS if self._takes(name)]

    def _takes(self, name: str) -> bool:
        try:
            check_seedable(self.scheduler(name) or "", self.pipeline)
        except ValueError:
            return False
        return True

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer that tells what is read of a prompt."""
        known = [name for name in self.family.tokenizers if has_part(self.shape.index, name)]
        return known[0] if known else "tokenizer"

    @property
    def tokens(self) -> int | None:
        """How many tokens of a prompt T5's or Qwen's encoder reads, the end included; None: as its tokenizer says."""
        clip = "tokenizer_3" in self.family.tokenizers and self.tokenizer == "tokenizer"
        return None if self.is_unet or clip else self.arguments.get("max_sequence_length")

    def offers(self, setting: str) -> bool:
        """Return whether a setting of sampling, or of a control in guidance, has an effect on this base."""
        if setting == "guidance_scale":
            return self.guidance.scale is not None
        if setting == "unconditional_scale":
            return self.guidance.by is not None
        if setting == "control_guidance_scale":
            return self.family.guides_in_one_call and self._tells_scale
        return setting in self.arguments

    def scheduler(self, name: str | None) -> str | None:
        """Return the class of the scheduler ``name`` (None: its own); None if its files are not here. ValueError for a
        scheduler that is not for it."""
        return scheduler_of(self.base, name, self.pipeline)

    def check_settings(self, settings: object, flag: str = "--") -> None:
        """Raise a ValueError for a setting of sampling, by its name in ``settings``, that the base would ignore.

        ``flag``: what its name begins with, in the sentence.
        """
        for name in _OF_THE_PIPELINE:
            if name not in self.arguments and getattr(settings, name, None):
                raise ValueError(f"A {self.pipeline} takes no {name}; leave {flag}{name} out.")
        self.check_text_length(getattr(settings, "max_sequence_length", None), flag)
        if getattr(settings, "guidance_scale", None) is not None and self.guidance.scale is None:
            by_second = self.guidance.by == "true_cfg_scale"
            instead = f"give {flag}true_cfg_scale in place of it" if by_second else "leave it out"
            raise ValueError(f"The base {self.base.name} ignores {flag}guidance_scale; {instead}.")

    def check_text_length(self, length: int | None, flag: str = "--") -> None:
        """Raise a ValueError if its pipeline cannot read ``length`` tokens of a prompt; None: as many as by default."""
        if length is None:
            return
        if "max_sequence_length" not in self.arguments:
            raise ValueError(f"A {self.pipeline} takes no max_sequence_length; leave {flag}max_sequence_length out.")
        self.family.check_text_length(self.config, {**self.shape.index, "_class_name": self.pipeline}, length, flag)

    @property
    def _tells_scale(self) -> bool:
        return self.is_unet or hasattr(getattr(diffusers, self.pipeline), "guidance_scale")

    def check_own_guidance(self) -> None:
        """Raise a ValueError if no control can have a guidance scale of its own."""
        self.family.check_one_call(self._tells_scale)
