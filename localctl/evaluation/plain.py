"""Compare folders of images that have no record of how they were generated.

The first folder is the reference, usually photos; the others are compared with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from localctl.data.folders import Walk, is_image
from localctl.distributed import process_device
from localctl.evaluation.provenance import versions
from localctl.evaluation.tables import head, line
from localctl.evaluation.workers import spread
from localctl.files import read_object
from localctl.images import ImageError, load_image
from localctl.metrics.extractors import Extractor, describe, load_extractor
from localctl.metrics.statistics import FeatureStatistics, Statistics, distances

BATCH = 16  # files read at once; features are extracted at once of those of one size
_RECORD = "sample.json"  # of sample.py
LEFT_OUT = (
    "Not measured, because it needs the records that evaluate_fid.py gen writes beside its images: control inside the "
    "mask, similarity, CLIP score, leak, paired differences."
)


@dataclass(frozen=True)
class Folder:
    """The measurements of one folder. sizes: images by (height, width). unreadable: names of files with the reason."""

    statistics: Statistics
    sizes: Mapping[tuple[int, int], int]
    unreadable: Sequence[str]


def image_files(folder: Path) -> list[Path]:
    """List all images in ``folder`` and its subfolders, by name; hidden files and other file types are skipped.

    Of a folder of sample.py, only those that its record names: no sheets, inputs or earlier runs.
    """
    found: list[Path] = []
    for path, below, names in Walk(folder):
        of_run = _images_of_run(path) if _RECORD in names else None
        if of_run is not None:
            below.clear()
        found += [path / name for name in names if is_image(name)] if of_run is None else of_run
    return sorted(found)


def _images_of_run(folder: Path) -> list[Path] | None:
    """Return the images that the record of sample.py in ``folder`` names, or None if its file is something else."""
    try:
        record = read_object(folder / _RECORD, "the record")
    except ValueError:
        return None
    names = record.get("images")
    if "localctl" not in record or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return [folder / Path(name).name for name in names]


def check_folders(folders: Mapping[str, Path]) -> None:
    """Raise ValueError for fewer than two folders, or a folder with fewer than 2 images. No image is read."""
    if len(folders) < 2:
        raise ValueError("Give at least two folders; the others are compared with the first.")
    for name, folder in folders.items():
        if len(image_files(folder)) < 2:
            raise ValueError(f"{folder} ({name}) has fewer than 2 images; a distance needs at least 2 on each side.")


@dataclass(frozen=True)
class Found:
    """What was read of some files. groups: (size, names, features) of images of one size. unreadable: with reasons."""

    groups: list[tuple[tuple[int, int], list[str], np.ndarray]]
    unreadable: list[str]


class FolderFeatures:
    """Extracts the features of images in ``folder``.

    extractor: loaded, or the name and weights to load it with. ValueError if it cannot be loaded.
    """

    def __init__(self, folder: Path, extractor: Extractor | tuple[str, str | None]) -> None:
        self.folder = folder
        self.extractor = load_for(*extractor) if isinstance(extractor, tuple) else extractor

    def __call__(self, names: Sequence[str]) -> Found:
        """Extract the features of the images with these names, all of one size at once."""
        by_size: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}
        found = Found([], [])
        for name in names:
            try:
                image = np.asarray(load_image(self.folder / name))
            except (ImageError, OSError) as error:
                found.unreadable.append(f"{name}: {error}")
                continue
            by_size.setdefault((image.shape[0], image.shape[1]), []).append((name, image))
        for size, group in by_size.items():
            keys, images = zip(*group, strict=True)
            found.groups.append((size, list(keys), self.extractor(np.stack(images)).numpy()))
        return found


def load_for(name: str, weights: str | None) -> Extractor:
    """Load an extractor on the device of this process: ValueError as for :func:`load_extractor`."""
    return load_extractor(name, weights, process_device("auto"))


def read_folder(folder: Path, extractor: Extractor, workers: tuple[int, str, str | None] | None = None) -> Folder:
    """Collect the feature statistics of all images in ``folder``.

    workers: number of Ray workers to share the images, with the name and weights of the extractor that they load; None:
    this process reads them. ValueError for fewer than 2 readable images.
    """
    metric, sizes = FeatureStatistics(extractor.dim), Counter[tuple[int, int]]()
    unreadable: list[str] = []
    names = [path.relative_to(folder).as_posix() for path in image_files(folder)]
    pieces = [names[first : first + BATCH] for first in range(0, len(names), BATCH)]
    count, own = (None, None) if workers is None else (workers[0], workers[1:])
    make = partial(FolderFeatures, folder)
    for found in spread(make(extractor), partial(make, own), pieces, count, "auto"):
        unreadable += found.unreadable
        for size, keys, features in found.groups:
            sizes[size] += len(keys)
            metric.update(features, keys)
    if sum(sizes.values()) < 2:
        raise ValueError(f"{folder} has {sum(sizes.values())} readable images; a distance needs at least 2.")
    return Folder(metric.statistics(**describe(extractor)), dict(sizes), unreadable)


def compare_folders(
    folders: Mapping[str, Path],
    extractor: Extractor,
    reference: str,
    workers: tuple[int, str, str | None] | None = None,
) -> dict[str, Any]:
    """Compute the distances of every folder to the folder named ``reference``, with sizes, warnings and provenance.

    workers: as for :func:`read_folder`. ValueError as for :func:`check_folders` and :func:`read_folder`.
    """
    read = {name: read_folder(folder, extractor, workers) for name, folder in folders.items()}
    rows: dict[str, Any] = {}
    warnings: list[str] = []
    for name, measured in read.items():
        rows[name] = {
            "images": measured.statistics.n,
            "sizes": {f"{width}x{height}": count for (height, width), count in sorted(measured.sizes.items())},
            "unreadable": list(measured.unreadable),
        }
        if measured.unreadable:
            warnings.append(f"{len(measured.unreadable)} files of {name} cannot be read ({measured.unreadable[0]})")
        if name != reference:
            report = distances(read[reference].statistics, measured.statistics)
            rows[name]["distances"] = report.values
            warnings += [text for text in report.warnings if text not in warnings]
    if len({size for measured in read.values() for size in measured.sizes}) > 1:
        warnings.append("the images have several sizes, and the distances also measure how they were resized")
    provenance = {**describe(extractor), "folders": {name: str(path.resolve()) for name, path in folders.items()}}
    return {
        "reference": reference,
        "rows": rows,
        "warnings": warnings,
        "provenance": {**provenance, "versions": versions()},
    }


def table(content: Mapping[str, Any]) -> str:
    """Format the result of :func:`compare_folders` as Markdown."""
    rows, reference = content["rows"], content["reference"]
    columns = list(next(row["distances"] for row in rows.values() if "distances" in row))
    lines = head(["", "images", "sizes", *columns])
    for name, row in rows.items():
        sizes = sorted(row["sizes"].items(), key=lambda item: -item[1])
        most = ", ".join(f"{size} ({count})" for size, count in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
        values = [f"{row['distances'][column]:.4g}" if "distances" in row else "" for column in columns]
        lines.append(line([f"{name} (reference)" if name == reference else name, str(row["images"]), most, *values]))
    return "\n".join([*lines, "", LEFT_OUT])
