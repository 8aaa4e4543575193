"""``Sampling``: the one record of how to sample, under the names of diffusers' pipelines. Nothing here loads torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from localctl.bases import MOST_STEPS, OWN_DEFAULTS, SCHEDULERS, SIGMAS, defaults_of, known_base

_OF_THE_CALL = (
    *("num_inference_steps", "guidance_scale", "guidance_rescale", "clip_skip", "eta"),
    *("true_cfg_scale", "max_sequence_length"),
)
_AT_LEAST_ONE = ("num_inference_steps", "batch_size")
_AT_LEAST_ZERO = ("max_sequence_length", "eta", "guidance_scale", "true_cfg_scale", "guidance_rescale")


@dataclass(frozen=True)
class Sampling:
    """How to sample; None leaves a setting open, for another record (:meth:`over`) or finally the pipeline to set.

    Args:
        scheduler: a name in ``SCHEDULERS``, such as ddim; it uses the noise schedule of the pipeline's own scheduler.
        guidance_scale: of classifier-free guidance.
        num_inference_steps: number of denoising steps.
        guidance_rescale, clip_skip, eta: as diffusers' pipelines define them.
        true_cfg_scale: of guidance by a second call, on FLUX and Qwen-Image.
        max_sequence_length: how many tokens of T5's or Qwen's a transformer reads.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: the spacing of noise levels; at most one.
        seeds: one seed or several; each image starts from the noise of its seed.
        batch_size: at most this many images at once; changes no image beyond rounding.
        prompt_weighting: whether weights in prompts act and prompts of any length are used (default); False: marks are
            text, and long prompts are cut.

    Raises:
        ValueError: an unknown scheduler, an empty list of seeds, a number that is too low or not finite.
    """

    scheduler: str | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    guidance_rescale: float | None = None
    clip_skip: int | None = None
    eta: float | None = None
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    seeds: int | Sequence[int] | None = None
    batch_size: int | None = None
    prompt_weighting: bool | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None:
            object.__setattr__(self, "seeds", (self.seeds,) if isinstance(self.seeds, int) else tuple(self.seeds))
            if not self.seeds:
                raise ValueError("There is no seed; give at least one.")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(f"Unknown scheduler {self.scheduler!r}; choose one of {', '.join(SCHEDULERS)}.")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"The {name.replace('_', ' ')} must be at least 1, not {value}.")
        for name in _AT_LEAST_ZERO:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"The {name.replace('_', ' ')} must be at least 0, not {value}.")
        for name in ("guidance_scale", "guidance_rescale", "eta", "true_cfg_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"The {name} must be a finite number, not {value}.")
        spacings = [name for name in SIGMAS if getattr(self, f"use_{name}_sigmas")]
        if len(spacings) > 1:
            raise ValueError(f"A scheduler spaces its sigmas in one way, not as {' and '.join(spacings)}; choose one.")
        most = MOST_STEPS.get(self.scheduler or "", self.num_inference_steps or 0)
        if (self.num_inference_steps or 0) > most:
            raise ValueError(
                f"The scheduler {self.scheduler} takes at most {most} steps, not {self.num_inference_steps}."
            )

    @classmethod
    def of(cls, settings: object) -> Sampling:
        """Return the settings of sampling in any object, by the names of its attributes."""
        return cls(**{field.name: getattr(settings, field.name, None) for field in fields(cls)})

    def over(self, other: Sampling) -> Sampling:
        """Return this record with the settings that it leaves open taken from ``other``."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Sampling(**{name: getattr(other, name) if value is None else value for name, value in own.items()})

    @property
    def sigmas(self) -> str | None:
        """The spacing of the noise levels, one of ``SIGMAS``; None = the scheduler's own."""
        return next((name for name in SIGMAS if getattr(self, f"use_{name}_sigmas")), None)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for a call of the pipeline: those of its settings that are not None."""
        return {name: getattr(self, name) for name in _OF_THE_CALL if getattr(self, name) is not None}


FREE = Sampling()  # leaves every setting open


def own_sampling(base: str) -> Sampling:
    """Return the default sampling settings of a base, known by name or folder or stated in its folder; :data:`FREE` for
    an unknown one."""
    known = known_base(base)
    if known is None and Path(base, OWN_DEFAULTS).is_file():
        known = defaults_of(base, {"local_files_only": True})
    own: dict[str, Any] = {} if known is None else {known.guided_by: known.guidance_scale}
    return replace(FREE, **own)


def check_stated(base: str) -> None:
    """Raise a ValueError if the folder of a base without guidance states a guidance scale."""
    if known_base(base) is None and own_sampling(base).guidance_scale is not None:
        raise ValueError(
            f"The file {Path(base, OWN_DEFAULTS)} states a guidance scale, which this base ignores, as it has no "
            "guidance; remove the file."
        )
