"""The sub-commands of `evaluate_fid.py`: statistics of photos, drawing, and the distances between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from localctl.data.bad import BadRow
from localctl.evaluation.drawn import Drawn, draw_set, open_source, read_pictures, read_set
from localctl.evaluation.provenance import check_provenance, versions, write_json
from localctl.evaluation.settings import FidSettings
from localctl.images import to_pil
from localctl.metrics.clip import CLIPScore
from localctl.metrics.extractors import ClipExtractor, Extractor, describe, load_extractor
from localctl.metrics.statistics import FeatureStatistics, Statistics, distances
from localctl.run.record import recorded

Say = Callable[[str], None]


def make_reference(settings: FidSettings, say: Say = print) -> Path:
    """``ref``: statistics of the photos themselves (never of their conditions), with what they are. Made once: a file
    of the same photos and extractor is left as it is.

    ValueError for data or an extractor that is not there, fewer than 2 usable photos, and a file of other photos.
    """
    source = open_source(settings)
    extractor = load_extractor(settings.extractor, settings.weights)
    path, count = settings.reference_file, min(len(source), settings.num_images)
    about = {
        "data": recorded(settings.data),
        "part": settings.part,
        "image_size": list(settings.data.size),
        "examples": count,
        "fingerprint": getattr(source, "fingerprint", None),
        **describe(extractor),
    }
    if path.is_file():
        found = Statistics.load(path).provenance
        changed = sorted(name for name, value in about.items() if found.get(name) != value)
        if changed:
            raise ValueError(f"{path} holds statistics with another {', '.join(changed)}; choose another reference.")
        say(f"{path} is up to date")
        return path
    bad: list[str] = []
    statistics = collect(extractor, _photos(source, count, bad), settings.batch_size)
    made = statistics.statistics(**about, bad_rows=len(bad), versions=versions())
    made.gaussian()  # raises for fewer than 2
    made.save(path)
    say(f"{path}: {made.n} photos, {len(bad)} unusable" + (f" ({bad[0]})" if bad else ""))
    return path


def _photos(source: Any, count: int, bad: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    for index in range(count):
        try:
            example = source[index]
        except BadRow as error:
            bad.append(f"{error.key}: {error.reason}")
            continue
        yield example.key, np.asarray(to_pil(example.pixels))


def collect(extractor: Extractor, pictures: Iterable[tuple[str, np.ndarray]], batch_size: int) -> FeatureStatistics:
    """Statistics of (key, uint8 (H,W,3)) pairs."""
    metric = FeatureStatistics(extractor.dim)
    batch: list[tuple[str, np.ndarray]] = []

    def flush() -> None:
        if batch:
            metric.update(extractor(np.stack([image for _, image in batch])), [key for key, _ in batch])
            batch.clear()

    for pair in pictures:
        batch.append(pair)
        if len(batch) == batch_size:
            flush()
    flush()
    return metric


def draw(settings: FidSettings, say: Say = print) -> None:
    """``gen``: draw every set that is asked for, as far as it is not there yet."""
    for name in settings.set_names:
        drawn = draw_set(settings, name, say)
        say(f"{settings.folder / name}: {drawn} pictures drawn in this process")


def score(settings: FidSettings, say: Say = print) -> dict[str, Any]:
    """``score``: distances of every set to the reference, to ``score_{extractor}.json`` in each set's folder.

    ValueError for missing pictures or statistics, another size, or another extractor.
    """
    reference = Statistics.load(settings.reference_file)
    sets = {name: read_set(settings.folder / name) for name in settings.set_names}
    extractor = load_extractor(settings.extractor, settings.weights)
    results = {}
    for name, (drawn_with, ids) in sets.items():
        folder = settings.folder / name
        results[name] = score_set(folder, ids, drawn_with, reference, extractor, settings.batch_size)
        write_json(folder / f"score_{extractor.name}.json", results[name])
        for key, value in results[name]["values"].items():
            say(f"{name}  {key} {value:.6g}")
        for warning in results[name]["warnings"]:
            say(f"{name}  WARNING {warning}")
    return results


def score_set(
    folder: Path,
    ids: list[str],
    drawn_with: dict[str, Any],
    reference: Statistics,
    extractor: Extractor,
    batch_size: int,
) -> dict[str, Any]:
    """values, warnings and provenance of one set."""
    clip = CLIPScore(extractor.clip) if isinstance(extractor, ClipExtractor) else None
    sizes: set[tuple[int, ...]] = set()

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        for item in read_pictures(folder, ids):
            _check_size(item, reference, folder, sizes)
            if clip is not None:
                clip.update(item.image, item.caption)
            yield item.id, item.image

    statistics = collect(extractor, pictures(), batch_size).statistics(**describe(extractor))
    report = distances(reference, statistics)
    values = dict(report.values)
    if clip is not None:
        values[f"clip_score_{extractor.name}"] = clip.compute()["clip_score"]
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
            "mask_protocol": {"mask": drawn_with["mask"], "drawn_by": "seed, visit and key", "stored": "masks/ID.png"},
            "seeds": {"seed": drawn_with["seed"], "picture": "hash of seed and index"},
            "versions": versions(),
            "drawn_with": drawn_with,
            "reference": dict(reference.provenance),
        },
    }
    check_provenance(str(folder), content)
    return content


def _check_size(item: Drawn, reference: Statistics, folder: Path, seen: set[tuple[int, ...]]) -> None:
    size, wanted = item.image.shape[:2], reference.provenance.get("image_size")
    seen.add(size)
    if wanted is not None and list(size) != list(wanted):
        raise ValueError(
            f"The pictures in {folder} are {size[1]}x{size[0]} but the photos were {wanted[1]}x{wanted[0]}; make the "
            "reference with the same data.resolution."
        )
