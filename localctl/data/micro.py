"""The embedded scenes as a dataset: each is rendered on first use, then cached in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localctl.boxes import Truth
from localctl.condition_models import compute
from localctl.conditions import ConditionConfig, extract
from localctl.data.sample import Example
from localctl.micro.detect import truth_of
from localctl.micro.scenes import PROFILES, SPLITS, scene


@dataclass(frozen=True)
class _Rendered:
    """A cached scene, in bytes; with a condition only if it cannot be computed from the image."""

    image: np.ndarray  # (128, 128, 3)
    object_masks: np.ndarray  # (n, 128, 128)
    condition: np.ndarray | None  # (128, 128, C)
    caption: str
    truth: Truth


_OWN = ("depth", "segmentation")  # conditions that come with the scenes


class MicroScenes:
    """Scenes 0 .. count-1 of a split and profile, with any kind of condition.

    With ``keep`` every scene is rendered once per worker and cached: rendering takes about 5 ms, a cached scene about
    0.1 MB. ValueError for an unknown split or profile, a count below 1, or a condition that does not
    come with the scenes and cannot be computed.
    """

    def __init__(
        self,
        split: str = "train",
        profile: str = "basic",
        count: int = 1000,
        condition: ConditionConfig | None = None,
        keep: bool = True,
    ) -> None:
        for name, value, known in (("split", split, SPLITS), ("profile", profile, PROFILES)):
            if value not in known:
                raise ValueError(f"Unknown scene {name} {value!r}; choose one of {', '.join(known)}.")
        if count < 1:
            raise ValueError(f"The number of scenes must be at least 1, not {count}.")
        if condition is not None and not condition.from_image and condition.kind not in _OWN:
            raise ValueError(
                f"The embedded scenes have no condition images for condition={condition.kind}; compute them by "
                "condition.model, or choose another condition, such as canny."
            )
        self.split = split
        self.profile = profile
        self.count = count
        self.condition = condition or ConditionConfig()
        self._cache: dict[int, _Rendered] | None = {} if keep else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"There is no scene {index}; there are {self.count}.")
        rendered = None if self._cache is None else self._cache.get(index)
        if rendered is None:
            rendered = self._render(index)
            if self._cache is not None:
                self._cache[index] = rendered
        condition = rendered.condition
        return Example(
            key=self.key(index),
            pixels=torch.from_numpy(rendered.image).permute(2, 0, 1).contiguous() / 127.5 - 1,
            condition=extract(self.condition, rendered.image) if condition is None else _unit(condition),
            caption=rendered.caption,
            object_masks=torch.from_numpy(rendered.object_masks) / 255,
            truth=rendered.truth,
        )

    def key(self, index: int) -> str:
        """Return the permanent name of scene ``index``."""
        return f"{self.profile}-{self.split}-{index}"

    def _render(self, index: int) -> _Rendered:
        full = scene(index, self.profile, self.split)
        condition = None  # computed anew at each visit, except by a model
        if self.condition.model is not None:
            condition = _bytes(compute(self.condition, [full.image])[0])
        elif self.condition.kind in _OWN:
            condition = {"depth": _bytes(full.depth)[..., None], "segmentation": full.segmentation}[self.condition.kind]
        return _Rendered(full.image, _bytes(full.masks), condition, full.caption, truth_of(full))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8)


def _unit(values: np.ndarray) -> Tensor:
    """Convert uint8 (H,W,C) to float (C,H,W) in [0,1]."""
    return torch.from_numpy(values).permute(2, 0, 1).contiguous() / 255
