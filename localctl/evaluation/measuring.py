"""Measure generated images against the images that their conditions were extracted from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from localctl.boxes import Box, Truth
from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, MaskedSamples
from localctl.diffusion import round_trip
from localctl.evaluation.generated_set import example_of, index_of, open_source, read_images
from localctl.evaluation.settings import FidSettings
from localctl.images import to_pil
from localctl.masks import MaskConfig
from localctl.metrics.clip import Clip, CLIPScore
from localctl.metrics.edges import MIN_EDGES, canny
from localctl.metrics.inside import EdgeScore, SSIMInside
from localctl.metrics.lfmse import LFMSE, DiffCC
from localctl.metrics.per_sample import PerSample
from localctl.metrics.regions import Leak, RegionAccuracy, RelationAccuracy, hidden_objects
from localctl.pipelines import BaseConfig, load_pipeline

CEILING = "VAE round trip"
Rows = list[dict[str, float]]  # values by the name of the metric, NaN = undefined; one row per image
_SECTIONS = {"base": BaseConfig, "data": DataConfig, "condition": ConditionConfig, "mask": MaskConfig}


@dataclass(frozen=True)
class Target:
    """The reference of one generated image.

    image: the true image, uint8 (H,W,3). mask: bool (H,W). truth: the objects and the relation in it, where known.
    """

    image: np.ndarray
    mask: np.ndarray
    caption: str
    truth: Truth | None


def settings_of(recorded: Mapping[str, Any]) -> FidSettings:
    """Rebuild the settings of a set from the contents of its settings.json."""
    known = {item.name for item in fields(FidSettings)}
    plain = {key: _tuples(value) for key, value in recorded.items() if key in known and key not in _SECTIONS}
    sections: dict[str, Any] = {}
    for name, kind in _SECTIONS.items():
        sections[name] = kind(**{key: _tuples(value) for key, value in recorded[name].items()})
    return FidSettings(**plain, **sections)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TargetReader:
    """Reads the references of generated images, of all sets that were generated with ``settings``."""

    def __init__(self, settings: FidSettings) -> None:
        self.samples = MaskedSamples(open_source(settings), settings.mask, settings.seed)
        self.single = None if settings.sample is None else index_of(self.samples.source, settings.sample)

    def read(self, folder: Path, ids: Sequence[str]) -> Iterator[Target]:
        """Read the references of images in ``folder``: found by position, checked by key. ValueError for other keys."""
        for item in read_images(folder, ids):
            example = example_of(self.samples, int(item.id), self.single)
            if example.key != item.key:
                raise ValueError(
                    f"The image {item.id} was generated from {item.key!r}, but the data now has {example.key!r} there; "
                    "restore the data, or generate the set again."
                )
            yield Target(np.asarray(to_pil(example.pixels)), item.mask > 0.5, item.caption, example.truth)


def read_targets(settings: FidSettings, folder: Path, ids: Sequence[str]) -> list[Target]:
    """Read references as :meth:`TargetReader.read` does, all at once."""
    return list(TargetReader(settings).read(folder, ids))


class Measurer:
    """Measures the images of several sets, some at a time.

    Args:
        settings: of the sets.
        folders: of the sets to measure, by name. ``CEILING`` has none: the references after a round trip through the
            VAE, which is loaded for the first images.
        floor: folder of the images that were generated without an adapter.
        clip: a CLIP, or the folder or hub id of one; None: no CLIP score.
    """

    def __init__(
        self, settings: FidSettings, folders: Mapping[str, Path | None], floor: Path, clip: Clip | str | Path | None
    ) -> None:
        self.settings, self.folders, self.floor = settings, folders, floor
        self.clip = clip if clip is None or isinstance(clip, Clip) else Clip(clip)
        self.targets = TargetReader(settings)
        self.vae: Any = None

    def __call__(self, ids: Sequence[str]) -> dict[str, Rows]:
        """Measure the images with these ids, of every set."""
        targets, base = list(self.targets.read(self.floor, ids)), _images(self.floor, ids)
        rows = {}
        for name, folder in self.folders.items():
            images = self._ceiling(targets) if folder is None else _images(folder, ids)
            rows[name] = [measure(*each, self.clip) for each in zip(images, base, targets, strict=True)]
        return rows

    def _ceiling(self, targets: Sequence[Target]) -> np.ndarray:
        if self.vae is None:
            self.vae = load_pipeline(self.settings.base).vae
        return round_trip(self.vae, np.stack([target.image for target in targets]))


def _images(folder: Path, ids: Sequence[str]) -> list[np.ndarray]:
    return [item.image for item in read_images(folder, ids)]


def measure(image: np.ndarray, base: np.ndarray, target: Target, clip: Clip | None) -> dict[str, float]:
    """Measure one image: the value of each metric by name, NaN where undefined.

    image, base: uint8 (H,W,3), from the same caption and noise; ``base`` was generated without the adapter.
    """
    edges, wanted = canny(image), canny(target.image)
    values: dict[str, float] = {}
    pairs: tuple[tuple[PerSample, tuple[str, ...]], ...] = (
        (EdgeScore(min_target=MIN_EDGES), ("precision", "recall", "f1")),
        (SSIMInside(), ("ssim",)),
        (LFMSE(), ("lfmse_in", "", "")),
        (DiffCC(), ("coincidence", "hallucination_in", "hallucination_out")),
    )
    for metric, names in pairs:
        metric.update(edges, wanted, target.mask)
        values |= {name: float(v) for name, v in zip(names, metric.per_sample()[0], strict=True) if name}
    if clip is not None:
        score = CLIPScore(clip)
        score.update(image, target.caption)
        values["clip_score"] = float(score.per_sample()[0, 0])
    if target.truth is not None:
        values |= _measure_objects(image, base, target.mask, target.truth)
    return values


def _measure_objects(image: np.ndarray, base: np.ndarray, mask: np.ndarray, truth: Truth) -> dict[str, float]:
    """Measure region accuracy of the objects wholly inside the mask, leak of the objects wholly outside, and the
    relation that the caption states."""
    regions, relation = RegionAccuracy(truth.find), RelationAccuracy(truth.find)
    leak = Leak(truth.find_shapes)
    regions.update(image, [item for item in truth.objects if mask[_pixels(item.box)].all()])
    leak.update(image, base, hidden_objects(truth.shapes, mask))
    region = regions.per_sample()[:, 0]
    values = {"region_accuracy": float(region.mean()) if len(region) else math.nan}
    values["leak"], values["relation"] = float(leak.per_sample()[0, 0]), math.nan
    if truth.relation is not None:
        relation.update(image, *truth.relation)
        values["relation"] = float(relation.per_sample()[0, 1])
    return values


def _pixels(box: Box) -> tuple[slice, slice]:
    x0, y0, x1, y1 = box
    return slice(int(y0), math.ceil(y1)), slice(int(x0), math.ceil(x1))
