"""Compare sets of images that were generated from the same examples, masks and noise.

Every generated image is measured against the image that its condition was extracted from. The base without an adapter
is the floor of every control metric, the true images after a round trip through the VAE are its ceiling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from localctl.boxes import Box, Truth
from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, MaskedSamples
from localctl.diffusion import round_trip
from localctl.evaluation.generated_set import (
    Speed,
    example_of,
    index_of,
    open_source,
    read_images,
    read_set,
    read_speed,
)
from localctl.evaluation.provenance import read_json, versions
from localctl.evaluation.settings import FidSettings
from localctl.files import sha256, sha256_of_files, sha256_of_folder
from localctl.images import to_pil
from localctl.masks import MaskConfig
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.metrics.clip import Clip, CLIPScore
from localctl.metrics.edges import MIN_EDGES, YARDSTICK, canny
from localctl.metrics.extractors import ClipExtractor, describe
from localctl.metrics.inside import EdgeScore, SSIMInside
from localctl.metrics.lfmse import LFMSE, DiffCC
from localctl.metrics.per_sample import PerSample
from localctl.metrics.regions import Leak, RegionAccuracy, RelationAccuracy, hidden_objects
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base

Rows = list[dict[str, float]]  # values by name, one row per sample
Cached = Callable[[Mapping[str, Any], Callable[[], dict[str, Rows]]], dict[str, Rows]]
CEILING = "VAE round trip"
LOWER_IS_BETTER = ("lfmse_in", "hallucination_in", "hallucination_out", "leak")
_SECTIONS = {"base": BaseConfig, "data": DataConfig, "condition": ConditionConfig, "mask": MaskConfig}
_SAME = ("base", "data", "condition", "mask", "part", "num_images", "seed", "sample", "set", "num_inference_steps") + (
    "guidance_scale",
    "scheduler",
)


@dataclass(frozen=True)
class Target:
    """The reference of one generated image.

    image: the true image, uint8 (H,W,3). mask: bool (H,W). truth: the objects and the relation in it, where known.
    """

    image: np.ndarray
    mask: np.ndarray
    caption: str
    truth: Truth | None


@dataclass(frozen=True)
class Comparison:
    """The values of every image of every set.

    tables: by row (the name of a set, or ``CEILING``), values (n, k) over the k ``columns``, NaN = undefined.
    ids: of the n images. floor: the row that was generated without an adapter. speeds: how fast each set was generated,
    where recorded. seconds: how long the measurement took.
    """

    columns: tuple[str, ...]
    tables: Mapping[str, np.ndarray]
    ids: Sequence[str]
    floor: str
    provenance: Mapping[str, Any]
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    seconds: float = math.nan
    _intervals: dict[tuple[str, str, str], Interval | None] = field(default_factory=dict, repr=False, compare=False)

    def interval(self, row: str, column: str) -> Interval | None:
        """Estimate the mean over the samples where the column is defined; None where it is defined for none."""
        return self._interval(row, "", column)

    def undefined(self, row: str, column: str) -> int:
        """Count the samples where the column is undefined."""
        return int(np.isnan(self._column(row, column)).sum())

    def difference(self, row: str, other: str, column: str) -> Interval | None:
        """Estimate the mean of ``row`` - ``other`` over the samples where both are defined: same example, mask and
        noise."""
        return self._interval(row, other, column)

    def _interval(self, row: str, other: str, column: str) -> Interval | None:
        key = (row, other, column)
        if key not in self._intervals:  # several tables need the same interval
            values = self._column(row, column) - (self._column(other, column) if other else 0)
            values = values[~np.isnan(values)]
            self._intervals[key] = bootstrap(values) if len(values) else None
        return self._intervals[key]

    def _column(self, row: str, column: str) -> np.ndarray:
        return self.tables[row][:, self.columns.index(column)]


def verdict(difference: Interval) -> str:
    """Return ``more`` or ``less``, or ``no difference`` where the interval contains 0."""
    if difference.low <= 0 <= difference.high:
        return "no difference"
    return "more" if difference.value > 0 else "less"


def compare(folders: Mapping[str, Path], clip: Clip | None = None, cached: Cached | None = None) -> Comparison:
    """Measure sets of generated images.

    Args:
        folders: the folder of each set, by name.
        clip: the CLIP that computes the CLIP score; None: no CLIP score.
        cached: returns the values of floor and ceiling for what they depend on, and calls the function that measures
            them where it has none; None: they are measured anew.

    Raises:
        ValueError: images are missing or unknown; the sets differ in ids, captions, masks, seeds or settings other than
            the adapter; no set was generated without an adapter; a set has the name of the ceiling.
    """
    began = time.perf_counter()
    if CEILING in folders or not folders:
        raise ValueError(f"Give at least one set, and no set the name {CEILING!r}, which is the ceiling's.")
    sets = {name: read_set(folder) for name, folder in folders.items()}
    ids = _check_same(folders, sets)
    steered = ("adapter", "controlnet")
    floors = [name for name, (made_with, _) in sets.items() if all(made_with.get(key) is None for key in steered)]
    if not floors:
        raise ValueError(
            "No set was generated without an adapter; generate the base, `evaluate_fid.py gen` with adapter=null."
        )
    floor = floors[0]
    settings = settings_of(sets[floor][0])
    targets = read_targets(settings, folders[floor], ids)
    base = _images(folders[floor], ids)

    def measure_all(images: np.ndarray) -> list[dict[str, float]]:
        return [measure(image, plain, target, clip) for image, plain, target in zip(images, base, targets, strict=True)]

    def measure_bounds() -> dict[str, list[dict[str, float]]]:
        vae = load_pipeline(settings.base).vae
        return {floor: measure_all(base), CEILING: measure_all(round_trip(vae, np.stack([t.image for t in targets])))}

    if cached is None:
        bounds = measure_bounds()
    else:
        bounds = cached(_depends_on(folders[floor], floor, ids, targets, clip), measure_bounds)
    rows = {name: bounds[name] if name == floor else measure_all(_images(folders[name], ids)) for name in folders}
    rows[CEILING] = bounds[CEILING]
    columns = tuple(rows[CEILING][0])
    tables = {name: np.array([[row[c] for c in columns] for row in made]) for name, made in rows.items()}
    speeds = {name: speed for name, folder in folders.items() if (speed := read_speed(folder)) is not None}
    provenance = _provenance(columns, sets, targets, clip)
    return Comparison(columns, tables, ids, floor, provenance, speeds, time.perf_counter() - began)


def _images(folder: Path, ids: Sequence[str]) -> np.ndarray:
    return np.stack([item.image for item in read_images(folder, ids)])


def _depends_on(
    folder: Path, name: str, ids: Sequence[str], targets: Sequence[Target], clip: Clip | None
) -> dict[str, Any]:
    """Return what the values of floor and ceiling depend on besides the code: settings, images, masks and captions of
    the floor, the true images, and the weights of the VAE and the CLIP."""
    settings = read_json(folder / "settings.json", "settings of the generated images")
    parts = (("images", "png"), ("masks", "png"), ("ids", "json"))
    files = [folder / part / f"{number}.{kind}" for number in ids for part, kind in parts]
    base = settings_of(settings).base
    return {
        "name": name,
        "settings": settings,
        "files_sha256": sha256_of_files(files, folder),
        "targets_sha256": sha256(b"".join(target.image.tobytes() for target in targets)),
        "vae_sha256": sha256_of_folder(base.vae or Path(resolve_base(base.name).id_or_path) / "vae"),
        "clip_sha256": None if clip is None else clip.weights_sha256,
    }


def _check_same(folders: Mapping[str, Path], sets: Mapping[str, tuple[dict[str, Any], list[str]]]) -> list[str]:
    """Return the ids that all sets share. ValueError when the sets differ in more than the adapter."""
    names = list(folders)
    first = names[0]
    settings, ids = sets[first]
    for name in names[1:]:
        other, other_ids = sets[name]
        changed = [key for key in _SAME if other.get(key) != settings.get(key)]
        if changed or other_ids != ids:
            raise ValueError(
                f"The sets {first!r} and {name!r} were generated with another {', '.join(changed) or 'id'}; "
                "generate them with the same settings, except for the adapter."
            )
        for number in ids:
            records = [read_json(folders[n] / "ids" / f"{number}.json", "record") for n in (first, name)]
            masks = [(folders[n] / "masks" / f"{number}.png").read_bytes() for n in (first, name)]
            if records[0] != records[1] or masks[0] != masks[1]:
                raise ValueError(
                    f"The image {number} has another key, seed or mask in {name!r} than in {first!r}; generate both "
                    "sets from the same data."
                )
    return ids


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


def read_targets(settings: FidSettings, folder: Path, ids: Sequence[str]) -> list[Target]:
    """Read the references of the images in ``folder``: found by position, checked by key. ValueError for other keys."""
    samples = MaskedSamples(open_source(settings), settings.mask, settings.seed)
    single = None if settings.sample is None else index_of(samples.source, settings.sample)
    targets = []
    for item in read_images(folder, ids):
        example = example_of(samples, int(item.id), single)
        if example.key != item.key:
            raise ValueError(
                f"The image {item.id} was generated from {item.key!r}, but the data now has {example.key!r} there; "
                "restore the data, or generate the set again."
            )
        targets.append(Target(np.asarray(to_pil(example.pixels)), item.mask > 0.5, item.caption, example.truth))
    return targets


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


def _provenance(
    columns: Sequence[str], sets: Mapping[str, tuple[dict[str, Any], list[str]]], targets: Sequence[Target], clip: Any
) -> dict[str, Any]:
    settings = next(iter(sets.values()))[0]
    return {
        "metrics": list(columns),
        "n_real": len(targets),
        "n_fake": len(targets),
        "image_format": "PNG, 8 bit RGB",
        "image_size": list(targets[0].image.shape[:2]),
        "edges": YARDSTICK,
        "clip": None if clip is None else describe(ClipExtractor(clip, "clip_score")),
        "mask_protocol": {"mask": settings["mask"], "stored": "masks/ID.png, the same for every set"},
        "seeds": {"seed": settings["seed"], "picture": "hash of seed and index, the same for every set"},
        "versions": versions(),
        "sets": {name: made_with for name, (made_with, _) in sets.items()},
    }
