"""The sub-commands of `evaluate_fid.py`: statistics of photos, generated sets, and the distances between both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from localctl.data.bad_rows import BadRow
from localctl.distributed import joined, process_device, union
from localctl.evaluation.generated_set import (
    GeneratedImage,
    generate_set,
    open_source,
    read_images,
    read_set,
    read_speed,
)
from localctl.evaluation.provenance import check_provenance, versions, write_json
from localctl.evaluation.settings import FidSettings
from localctl.images import to_pil
from localctl.lazy import moved_names
from localctl.metrics.clip import CLIPScore
from localctl.metrics.extractors import ClipExtractor, Extractor, describe, load_extractor
from localctl.metrics.statistics import FeatureStatistics, Statistics, distances
from localctl.redaction import recorded

logger = logging.getLogger(__name__)
__getattr__ = moved_names(__name__, {"draw": f"{__name__}:generate"})


def make_reference(settings: FidSettings) -> Path:
    """Run ``ref``: compute the feature statistics of the photos (not of their conditions) and return their file.

    An existing file with the same data and extractor is left unchanged.

    Raises:
        ValueError: the data or the extractor is missing; fewer than 2 photos are usable; the file exists and holds
            statistics of other photos or of another extractor.
    """
    source = open_source(settings)
    if len(source) < 2:
        raise ValueError(
            f"The part {settings.part!r} of the data has {len(source)} example, but a distance needs at least 2 images "
            "on each side; raise data.validation_share, or set part=train."
        )
    extractor = load_extractor(settings.extractor, settings.weights, process_device(settings.device))
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
        metric = collect(extractor, count, partial(_photos, source, mine), settings.batch_size, share)
        made, bad = metric.statistics(**provenance), sorted(union(mine))
    made = replace(made, provenance={**made.provenance, "bad_rows": len(bad), "versions": versions()})
    made.gaussian()  # raises for fewer than 2
    if share[0] == 0:
        made.save(path)
        logger.info(f"{path}: {made.n} photos, {len(bad)} unusable" + (f" ({bad[0]})" if bad else ""))
    return path


def _photos(source: Any, bad: set[str], indices: range) -> Iterator[tuple[str, np.ndarray]]:
    for index in indices:
        try:
            example = source[index]
        except BadRow as error:
            bad.add(f"{error.key}: {error.reason}")
            continue
        yield example.key, np.asarray(to_pil(example.pixels))


def collect(
    extractor: Extractor,
    count: int,
    images: Callable[[range], Iterable[tuple[str, np.ndarray]]],
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> FeatureStatistics:
    """Collect the feature statistics of images.

    Args:
        count: how many numbers, from 0, are given to ``images``.
        images: returns the images of a range of numbers as (key, uint8 (H,W,3)) pairs; may return fewer than asked for.
        share: (rank, number of processes). Processes take the batches in turn; the batches are the same for any number
            of processes.
    """
    metric = FeatureStatistics(extractor.dim)
    rank, processes = share
    for number, first in enumerate(range(0, count, batch_size)):
        batch = list(images(range(first, min(first + batch_size, count)))) if number % processes == rank else []
        if batch:
            metric.update(extractor(np.stack([image for _, image in batch])), [key for key, _ in batch])
    return metric


def generate(settings: FidSettings) -> None:
    """Run ``gen``: generate the missing images of every set that ``settings.prompts`` asks for."""
    for name in settings.set_names:
        count = generate_set(settings, name)
        speed = read_speed(settings.folder / name)
        logger.info(
            f"{settings.folder / name}: {count} images generated in this process" + (f", {speed}" if speed else "")
        )


def score(settings: FidSettings) -> dict[str, Any]:
    """Run ``score``: compute the distances of every set to the reference.

    They are returned by the name of the set, and written to ``score_{extractor}.json`` in the set's folder. ValueError
    when images or statistics are missing, or when their sizes or extractors differ.
    """
    reference = Statistics.load(settings.reference_file)
    sets = {name: read_set(settings.folder / name) for name in settings.set_names}
    extractor = load_extractor(settings.extractor, settings.weights, process_device(settings.device))
    results = {}
    with joined() as (rank, _):
        for name, (made_with, ids) in sets.items():
            folder = settings.folder / name
            results[name] = score_set(folder, ids, made_with, reference, extractor, settings.batch_size)
            if rank == 0:
                _tell(name, results[name], folder / f"score_{extractor.name}.json")
    return results


def _tell(name: str, result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
    for key, value in result["values"].items():
        logger.info(f"{name}  {key} {value:.6g}")
    for text in result["warnings"]:
        logger.warning(f"{name}  {text}")


def score_set(
    folder: Path,
    ids: list[str],
    made_with: dict[str, Any],
    reference: Statistics,
    extractor: Extractor,
    batch_size: int,
) -> dict[str, Any]:
    """Compute values, warnings and provenance of one set. Each process reads a part of the images; all return the same.

    ValueError when the images have another size than the photos, or several sizes.
    """
    clip = CLIPScore(extractor.clip) if isinstance(extractor, ClipExtractor) else None
    seen: set[tuple[int, ...]] = set()

    def images(indices: range) -> Iterator[tuple[str, np.ndarray]]:
        for item in read_images(folder, [ids[index] for index in indices]):
            _check_size(item, reference, folder, seen)
            if clip is not None:
                clip.update(item.image, item.caption)
            yield item.id, item.image

    with joined() as share:
        statistics = collect(extractor, len(ids), images, batch_size, share).statistics(**describe(extractor))
        sizes = union(seen)
        clip_score = None if clip is None else clip.compute()["clip_score"]
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


def _check_size(item: GeneratedImage, reference: Statistics, folder: Path, seen: set[tuple[int, ...]]) -> None:
    size, wanted = item.image.shape[:2], reference.provenance.get("image_size")
    seen.add(size)
    if wanted is not None and list(size) != list(wanted):
        raise ValueError(
            f"The images in {folder} are {size[1]}x{size[0]} but the photos were {wanted[1]}x{wanted[0]}; make the "
            "reference with the same data.resolution."
        )
