"""Compare folders of images that have no record of how they were generated.

The first folder is the reference, usually photos; the others are compared with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localctl.data.folders import Walk, is_image
from localctl.evaluation.provenance import versions
from localctl.evaluation.tables import head, line
from localctl.images import ImageError, load_image
from localctl.metrics.extractors import Extractor, describe
from localctl.metrics.statistics import FeatureStatistics, Statistics, distances

BATCH = 16
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
    """List all images in ``folder`` and its subfolders, by name; hidden files and other file types are skipped."""
    return sorted(path / name for path, _, names in Walk(folder) for name in names if is_image(name))


def check_folders(folders: Mapping[str, Path]) -> None:
    """Raise ValueError for fewer than two folders, or a folder with fewer than 2 images. No image is read."""
    if len(folders) < 2:
        raise ValueError("Give at least two folders; the others are compared with the first.")
    for name, folder in folders.items():
        if len(image_files(folder)) < 2:
            raise ValueError(f"{folder} ({name}) has fewer than 2 images; a distance needs at least 2 on each side.")


def read_folder(folder: Path, extractor: Extractor) -> Folder:
    """Collect the feature statistics of all images in ``folder``. ValueError for fewer than 2 readable images."""
    metric, sizes = FeatureStatistics(extractor.dim), Counter[tuple[int, int]]()
    unreadable: list[str] = []
    for keys, images in _batches(folder, sizes, unreadable):
        metric.update(extractor(images), keys)
    if sum(sizes.values()) < 2:
        raise ValueError(f"{folder} has {sum(sizes.values())} readable images; a distance needs at least 2.")
    return Folder(metric.statistics(**describe(extractor)), dict(sizes), unreadable)


def _batches(
    folder: Path, sizes: Counter[tuple[int, int]], unreadable: list[str]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield names and images (B,H,W,3) uint8 in batches of one size; fill in ``sizes`` and ``unreadable``."""
    waiting: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}
    for path in image_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            image = np.asarray(load_image(path))
        except (ImageError, OSError) as error:
            unreadable.append(f"{name}: {error}")
            continue
        size = (image.shape[0], image.shape[1])
        sizes[size] += 1
        group = waiting.setdefault(size, [])
        group.append((name, image))
        if len(group) == BATCH:
            yield [key for key, _ in group], np.stack([array for _, array in group])
            group.clear()
    for group in waiting.values():
        if group:
            yield [key for key, _ in group], np.stack([array for _, array in group])


def compare_folders(folders: Mapping[str, Path], extractor: Extractor, reference: str) -> dict[str, Any]:
    """Compute the distances of every folder to the folder named ``reference``, with sizes, warnings and provenance.

    ValueError as for :func:`check_folders` and :func:`read_folder`.
    """
    read = {name: read_folder(folder, extractor) for name, folder in folders.items()}
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
