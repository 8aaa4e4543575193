"""The form that both tabs have: prompt, sampling, seeds and addons, checked, and the settings of a run from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localctl.bases import SCHEDULERS
from localctl.studio import limits
from localctl.studio.addon_fields import PLACES, Addons, read_addons
from localctl.studio.config import StudioConfig

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class SharedForm:
    """The fields of both tabs, checked. None: what suits base and method."""

    prompt: str
    negative_prompt: str
    scheduler: str | None
    steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    seeds: list[int]
    addons: Addons

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of a run that these fields decide, but for prompt and addons."""
        return {
            "negative_prompt": self.negative_prompt or None,
            "scheduler": self.scheduler,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "true_cfg_scale": self.true_cfg_scale,
            "seeds": self.seeds,
        }


def read_shared(values: Mapping[str, Any], config: StudioConfig, places: Sequence[str] = PLACES) -> dict[str, Any]:
    """Read the fields of both tabs by name. ValueError in one sentence for the first that is out of bounds."""
    get = values.get
    scheduler = limits.choice("The scheduler", get("scheduler"), (AUTO, *SCHEDULERS))
    seed = limits.seed(get("seed"))
    count = limits.whole("The images", get("images"), 1, limits.MAX_IMAGES)
    return {
        "prompt": limits.text("The prompt", get("prompt")).strip(),
        "negative_prompt": limits.text("The negative prompt", get("negative_prompt")).strip(),
        "scheduler": None if scheduler == AUTO else scheduler,
        "steps": limits.whole("The steps", get("steps"), 1, limits.MAX_STEPS),
        "guidance_scale": limits.optional_number("The guidance scale", get("guidance_scale"), 0, 30),
        "true_cfg_scale": limits.optional_number("The true CFG scale", get("true_cfg_scale"), 0, 30),
        "seeds": [seed + index for index in range(count)],
        "addons": read_addons(values, config, places),
    }
