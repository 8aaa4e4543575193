"""What the configs of a base tell of its family, before anything is loaded: sizes, and how it is guided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Guidance:
    """How the pipelines of a base are guided.

    scale: ``guidance_scale`` where none is given; None: the base ignores it. by: the argument that guides away from the
    negative prompt, where it is above ``above``; None: nothing does. true_cfg_scale: that argument where none is given.
    negative_prompt: the one without which there is no such guidance; None: any base has one.
    """

    scale: float | None
    by: str | None = "guidance_scale"
    above: float = 1.0
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None

    def is_on(self, settings: object) -> bool:
        """Return whether settings with these names guide away from the negative prompt."""
        value = None if self.by is None else getattr(settings, self.by)
        return value is not None and value > self.above

    def way_on(self, flag: str = "--") -> str:
        """Return what to do to be guided, as a part of a sentence; ``flag``: what names of settings begin with."""
        return f"give a {flag}{self.by} above {self.above:g}" if self.by else "choose a base with guidance"


class Configured:
    """A family, by the configs of its bases alone."""

    name: ClassVar[str]  # used in messages
    guides_in_one_call: ClassVar[bool] = True  # negative + g (prompt - negative), from rows of one call
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)  # the first that a base has tells what is read of a prompt
    most_tokens: ClassVar[int | None] = None  # that its pipelines let a prompt have; None: any number
    no_phrases: ClassVar[tuple[str, ...]] = ()  # pipelines in whose tokens phrases cannot be located
    latents_of_side: ClassVar[int | None] = None  # of images that the base was trained for; None: as its config says

    @classmethod
    def guidance(cls, config: Mapping[str, Any], index: Mapping[str, Any]) -> Guidance:
        """Return how a base is guided. ``config``: of the denoiser; ``index``: the base's ``model_index.json``."""
        return Guidance(7.5)

    @classmethod
    def size_of(cls, config: Mapping[str, Any], factor: int) -> tuple[int, int]:
        """Return the (H, W) of the images that a base was trained for. ``factor``: pixels per latent."""
        sample = cls.latents_of_side or config.get("sample_size") or 64  # the default of the U-Net's class
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * factor, width * factor

    @classmethod
    def multiple_of(cls, config: Mapping[str, Any], factor: int) -> int:
        """Return the pixels that height and width must be multiples of. ``factor``: pixels per latent."""
        return factor

    @classmethod
    def text_limit(cls, config: Mapping[str, Any]) -> int | None:
        """Return the highest ``max_sequence_length`` that the pipelines of a base take; None: any."""
        return cls.most_tokens

    @classmethod
    def fewest_tokens(cls, index: Mapping[str, Any]) -> int:
        """Return the lowest ``max_sequence_length`` with which the last text encoder of a base reads the prompt."""
        return 1

    @classmethod
    def check_text_length(
        cls, config: Mapping[str, Any], index: Mapping[str, Any], length: int | None, flag: str = "--"
    ) -> None:
        """Raise a ValueError if the pipeline of a base cannot read ``length`` tokens of a prompt. ``index``: the base's
        ``model_index.json``; ``flag``: what names of settings begin with."""
        if length is None:
            return
        fewest, most, pipeline = cls.fewest_tokens(index), cls.text_limit(config), index.get("_class_name")
        if most is not None and length > most:
            raise ValueError(
                f"{flag}max_sequence_length is {length}, but a {pipeline} reads at most {most} tokens of a prompt; "
                "lower it."
            )
        if length < fewest:
            raise ValueError(
                f"{flag}max_sequence_length is {length}, with which the last text encoder of a {pipeline} reads no "
                f"prompt; give at least {fewest}, or leave it out."
            )

    @classmethod
    def check_located(cls, pipeline: str) -> None:
        """Raise a ValueError if phrases cannot be located in the tokens of a pipeline of this class."""
        if pipeline in cls.no_phrases:
            raise ValueError(
                f"Phrases cannot be located in the tokens of a {pipeline}; use a base of FLUX.2 Klein, or regions "
                "without phrases."
            )

    @classmethod
    def check_one_call(cls, tells_scale: bool = True) -> None:
        """Raise a ValueError if, with the pipelines of this family, no control can have a guidance scale of its own.

        ``tells_scale``: whether the pipeline has its guidance scale as an attribute.
        """
        if not cls.guides_in_one_call:
            raise ValueError(
                f"The pipelines of the {cls.name} do not compute negative + g (prompt - negative) from one call for "
                "both, so no control can have a guidance scale of its own; leave it out."
            )
        if not tells_scale:
            raise ValueError(
                f"The pipelines of the {cls.name} do not tell their guidance scale, so no control can have one of its "
                "own; leave it out."
            )
