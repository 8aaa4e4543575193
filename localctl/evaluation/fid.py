"""The sub-commands of `evaluate_fid.py`: statistics of photos, generated sets, and the distances between both."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from localctl.data.bad_rows import BadRow
from localctl.distributed import joined, process_device, union
from localctl.evaluation.generated_set import (
    generate_set,
    open_source,
    read_images,
    read_set,
    read_speed,
)
from localctl.evaluation.provenance import check_provenance, versions, write_json
from localctl.evaluation.settings import FidSettings
from localctl.evaluation.workers import spread
from localctl.images import to_pil
from localctl.lazy import moved_names
from localctl.metrics.clip import CLIPScore
from localctl.metrics.extractors import ClipExtractor, Extractor, describe, load_extractor
from localctl.metrics.per_sample import PerSample
from localctl.metrics.statistics import FeatureStatistics, Statistics, distances
from localctl.redaction import recorded

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Note = TypeVar("Note")
__getattr__ = moved_names(__name__, {"draw": f"{__name__}:generate"})


def make_reference(settings: FidSettings) -> Path:
    """Run ``ref``: compute the feature statistics of the photos (not of their conditions) and return their file.

    An existing file with the same data and extractor is left unchanged.

    Raises:
        ValueError: the data or the extractor is missing; fewer than 2 photos are usable; the file exists and holds
            statistics of other photos or of another extractor.
    """
    photos = PhotoFeatures(settings)
    source = photos.source
    if len(source) < 2:
        raise ValueError(
            f"The part {settings.part!r} of the data has {len(source)} example, but a distance needs at least 2 images "
            "on each side; raise data.validation_share, or set part=train."
        )
    extractor = photos.extractor
    path, count = settings.reference_file, min(len(source), settings.num_images)
    provenance = {
        "data": recorded(settings.data),
        "part": settings.part,
        "image_size": list(settings.data.size),
        "examples": count,
        "fingerprint": getattr(source, "fingerprint", None),
        **describe(extractor),
    }
    if path.is_file():
        found = Statistics.load(path).provenance
        changed = sorted(name for name, value in provenance.items() if found.get(name) != value)
        if changed:
            raise ValueError(f"{path} holds statistics with another {', '.join(changed)}; choose another reference.")
        logger.info(f"{path} is up to date")
        return path
    mine: set[str] = set()
    with joined() as share:
        batches = _batches(range(count), settings.batch_size, share)
        read = spread(photos, partial(PhotoFeatures, settings), batches, settings.num_workers, settings.device)
        metric = collect(extractor.dim, read, mine)
        made, bad = metric.statistics(**provenance), sorted(union(mine))
    made = replace(made, provenance={**made.provenance, "bad_rows": len(bad), "versions": versions()})
    made.gaussian()  # raises for fewer than 2
    if share[0] == 0:
        made.save(path)
        logger.info(f"{path}: {made.n} photos, {len(bad)} unusable" + (f" ({bad[0]})" if bad else ""))
    return path


@dataclass(frozen=True)
class Batch(Generic[Note]):
    """Features of images.

    keys: of the images. features: (B, d) float32. notes: what else was found. scores: a row of the CLIP score's columns
    per image, where they are asked for.
    """

    keys: list[str]
    features: np.ndarray
    notes: set[Note]
    scores: list[tuple[float, ...]] = field(default_factory=list)


class Scores(PerSample):
    """CLIP scores that were computed elsewhere."""

    columns = CLIPScore.columns
    higher_is_better = True

    def update(self, rows: Sequence[tuple[float, ...]]) -> None:
        """Add rows of the columns of :class:`CLIPScore`."""
        self.add(*rows)


class PhotoFeatures:
    """Extracts the features of photos, the examples of ``settings.part``.

    Raises:
        ValueError: the data or the extractor cannot be loaded.
    """

    def __init__(self, settings: FidSettings) -> None:
        self.source = open_source(settings)
        self.extractor = _extractor(settings)

    def __call__(self, indices: Sequence[int]) -> Batch[str]:
        """Extract the features of the photos with these numbers. The notes name those that cannot be used."""
        keys, photos, bad = [], [], set()
        for index in indices:
            try:
                example = self.source[index]
            except BadRow as error:
                bad.add(f"{error.key}: {error.reason}")
                continue
            keys.append(example.key)
            photos.append(np.asarray(to_pil(example.pixels)))
        return Batch(keys, _features(self.extractor, photos), bad)


def _extractor(settings: FidSettings) -> Extractor:
    return load_extractor(settings.extractor, settings.weights, process_device(settings.device))


def _features(extractor: Extractor, images: Sequence[np.ndarray]) -> np.ndarray:
    return extractor(np.stack(images)).numpy() if images else np.empty((0, extractor.dim), np.float32)


def _batches(items: Sequence[Item], size: int, share: tuple[int, int]) -> list[Sequence[Item]]:
    """Return the batches of this process; share: (rank, number of processes). Processes take the batches in turn, and
    the batches are the same for any number of processes."""
    rank, processes = share
    return [items[first : first + size] for first in range(0, len(items), size)][rank::processes]


def collect(
    dim: int, batches: Iterable[Batch[Note]], notes: set[Note], scores: Scores | None = None
) -> FeatureStatistics:
    """Collect the feature statistics of batches, their notes in ``notes`` and their scores in ``scores``."""
    metric = FeatureStatistics(dim)
    for batch in batches:
        notes |= batch.notes
        if batch.keys:
            metric.update(batch.features, batch.keys)
        if scores is not None and batch.scores:
            scores.update(batch.scores)
    return metric


def generate(settings: FidSettings) -> None:
    """Run ``gen``: generate the missing images of every set that ``settings.prompts`` asks for."""
    for name in settings.set_names:
        count = generate_set(settings, name)
        speed = read_speed(settings.folder / name)
        logger.info(
            f"{settings.folder / name}: {count} images generated "
            + ("in this process" if settings.num_workers is None else f"by {settings.num_workers} workers")
            + (f", {speed}" if speed else "")
        )


def score(settings: FidSettings) -> dict[str, Any]:
    """Run ``score``: compute the distances of every set to the reference.

    They are returned by the name of the set, and written to ``score_{extractor}.json`` in the set's folder. ValueError
    when images or statistics are missing, or when their sizes or extractors differ.
    """
    reference = Statistics.load(settings.reference_file)
    sets = {name: read_set(settings.folder / name) for name in settings.set_names}
    extractor = _extractor(settings)
    results = {}
    with joined() as (rank, _):
        for name, (made_with, ids) in sets.items():
            folder = settings.folder / name
            results[name] = score_set(folder, ids, made_with, reference, extractor, settings)
            if rank == 0:
                _tell(name, results[name], folder / f"score_{extractor.name}.json")
    return results


def _tell(name: str, result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
    for key, value in result["values"].items():
        logger.info(f"{name}  {key} {value:.6g}")
    for text in result["warnings"]:
        logger.warning(f"{name}  {text}")


class SetFeatures:
    """Extracts the features of generated images, and with a CLIP also their CLIP scores.

    Args:
        wanted: (height, width) of the photos; None = unknown.
        extractor: None = that of ``settings``.
    """

    def __init__(
        self,
        folder: Path,
        wanted: Sequence[int] | None,
        settings: FidSettings,
        extractor: Extractor | None = None,
    ) -> None:
        self.folder, self.wanted = folder, wanted
        self.extractor = extractor or _extractor(settings)

    def __call__(self, ids: Sequence[str]) -> Batch[tuple[int, ...]]:
        """Extract the features of the images with these ids. The notes are their sizes (height, width)."""
        clip = CLIPScore(self.extractor.clip) if isinstance(self.extractor, ClipExtractor) else None
        images, sizes = [], set()
        for item in read_images(self.folder, ids):
            size = item.image.shape[:2]
            if self.wanted is not None and list(size) != list(self.wanted):
                raise ValueError(
                    f"The images in {self.folder} are {size[1]}x{size[0]} but the photos were "
                    f"{self.wanted[1]}x{self.wanted[0]}; make the reference with the same data.resolution."
                )
            if clip is not None:
                clip.update(item.image, item.caption)
            sizes.add(size)
            images.append(item.image)
        scores = [] if clip is None else [tuple(row) for row in clip.per_sample().tolist()]
        return Batch(list(ids), _features(self.extractor, images), sizes, scores)


def score_set(
    folder: Path,
    ids: list[str],
    made_with: dict[str, Any],
    reference: Statistics,
    extractor: Extractor,
    settings: FidSettings,
) -> dict[str, Any]:
    """Compute values, warnings and provenance of one set. Each process reads a part of the images; all return the same.

    settings: name the batch size, the workers, and the extractor that these load.

    ValueError when the images have another size than the photos, or several sizes.
    """
    scores = Scores() if isinstance(extractor, ClipExtractor) else None
    seen: set[tuple[int, ...]] = set()
    wanted = reference.provenance.get("image_size")
    with joined() as share:
        batches = _batches(ids, settings.batch_size, share)
        make = partial(SetFeatures, folder, wanted, settings)
        read = spread(make(extractor), make, batches, settings.num_workers, settings.device)
        statistics = collect(extractor.dim, read, seen, scores).statistics(**describe(extractor))
        sizes = union(seen)
        clip_score = None if scores is None else scores.compute()["clip_score"]
    if len(sizes) > 1:
        raise ValueError(f"The images in {folder} have different sizes (height, width): {sorted(sizes)}.")
    report = distances(reference, statistics)
    values = dict(report.values)
    if clip_score is not None:
        values[f"clip_score_{extractor.name}"] = clip_score
    content = {
        "values": values,
        "warnings": list(report.warnings),
        "provenance": {
            **describe(extractor),
            "metrics": sorted(values),
            "n_real": reference.n,
            "n_fake": statistics.n,
            "image_format": "PNG, 8 bit RGB",
            "image_size": list(sizes.pop()),
            "mask_protocol": {"mask": made_with["mask"], "drawn_by": "seed, visit and key", "stored": "masks/ID.png"},
            "seeds": {"seed": made_with["seed"], "picture": "hash of seed and index"},
            "versions": versions(),
            "drawn_with": made_with,
            "reference": dict(reference.provenance),
        },
    }
    check_provenance(str(folder), content)
    return content
