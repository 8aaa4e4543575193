"""The embedded scenes as a data set: rendered when first asked for, then kept in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localctl.boxes import Truth
from localctl.conditions import ConditionConfig, extract
from localctl.data.sample import Example
from localctl.micro.detect import truth_of
from localctl.micro.scenes import PROFILES, SPLITS, scene


@dataclass(frozen=True)
class _Rendered:
    """What is kept of a scene, in bytes; a condition only where the image does not yield it."""

    image: np.ndarray  # (128, 128, 3)
    object_masks: np.ndarray  # (n, 128, 128)
    condition: np.ndarray | None  # (128, 128, C)
    caption: str
    truth: Truth


class MicroScenes:
    """Scenes 0 .. count-1 of a split and profile, with any kind of condition.

    Rendering a scene takes about 5 ms, a kept one about 0.1 MB; with ``keep`` every scene is rendered once (per
    worker). ValueError for an unknown split or profile, or no scene at all.
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
        if condition is not None and condition.kind == "column":
            raise ValueError("The embedded scenes have no column of condition images; choose another condition.")
        self.split = split
        self.profile = profile
        self.count = count
        self.condition = condition or ConditionConfig()
        self._kept: dict[int, _Rendered] | None = {} if keep else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"There is no scene {index} among {self.count}.")
        kept = None if self._kept is None else self._kept.get(index)
        if kept is None:
            kept = self._render(index)
            if self._kept is not None:
                self._kept[index] = kept
        return Example(
            key=f"{self.profile}-{self.split}-{index}",
            pixels=torch.from_numpy(kept.image).permute(2, 0, 1).contiguous() / 127.5 - 1,
            condition=extract(self.condition, kept.image) if kept.condition is None else _unit(kept.condition),
            caption=kept.caption,
            object_masks=torch.from_numpy(kept.object_masks) / 255,
            truth=kept.truth,
        )

    def _render(self, index: int) -> _Rendered:
        full = scene(index, self.profile, self.split)
        kind = self.condition.kind
        condition = {"depth": _bytes(full.depth)[..., None], "segmentation": full.segmentation}.get(kind)
        return _Rendered(full.image, _bytes(full.masks), condition, full.caption, truth_of(full))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8)


def _unit(values: np.ndarray) -> Tensor:
    """Bring uint8 (H,W,C) to float (C,H,W) in [0,1]."""
    return torch.from_numpy(values).permute(2, 0, 1).contiguous() / 255
