"""Folders of anybody's images, without records of how they were generated: what can be measured all the same.

The first folder is the reference, photos as a rule; the others are compared with it.
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
    "Left out, as it needs the records that evaluate_fid.py gen writes beside its images: control inside the mask, "
    "similarity, CLIP score, leak, paired differences."
)


@dataclass(frozen=True)
class Folder:
    """What was read of one folder. sizes: (height, width) -> how many; unreadable: names with the reason."""

    statistics: Statistics
    sizes: Mapping[tuple[int, int], int]
    unreadable: Sequence[str]


def image_files(folder: Path) -> list[Path]:
    """List all images in ``folder`` and the folders in it, by name; hidden ones and other files are not looked at."""
    return sorted(path / name for path, _, names in Walk(folder) for name in names if is_image(name))


def check_folders(folders: Mapping[str, Path]) -> None:
    """Raise ValueError for fewer than two folders, and for one with fewer than 2 images; reads none of them."""
    if len(folders) < 2:
        raise ValueError("Give two folders at least; the others are compared with the first.")
    for name, folder in folders.items():
        if len(image_files(folder)) < 2:
            raise ValueError(f"{folder} ({name}) has fewer than 2 images; a distance needs at least 2 on each side.")


def read_folder(folder: Path, extractor: Extractor) -> Folder:
    """Measure all images in ``folder``. ValueError for one with fewer than 2 images that can be read."""
    metric, sizes = FeatureStatistics(extractor.dim), Counter[tuple[int, int]]()
    unreadable: list[str] = []
    for keys, images in _batches(folder, sizes, unreadable):
        metric.update(extractor(images), keys)
    if sum(sizes.values()) < 2:
        raise ValueError(f"{folder} has {sum(sizes.values())} images that can be read; a distance needs at least 2.")
    return Folder(metric.statistics(**describe(extractor)), dict(sizes), unreadable)


def _batches(
    folder: Path, sizes: Counter[tuple[int, int]], unreadable: list[str]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Images of one size at a time, uint8 (B,H,W,3), with their names; counts go into ``sizes`` and ``unreadable``."""
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
    """Give the distances of every folder to the one named ``reference``, sizes, warnings, and where the figures come
    from.

    ValueError as for :func:`check_folders` and :func:`read_folder`.
    """
    read = {name: read_folder(folder, extractor) for name, folder in folders.items()}
    rows: dict[str, Any] = {}
    warnings: list[str] = []
    for name, own in read.items():
        rows[name] = {
            "images": own.statistics.n,
            "sizes": {f"{width}x{height}": count for (height, width), count in sorted(own.sizes.items())},
            "unreadable": list(own.unreadable),
        }
        if own.unreadable:
            warnings.append(f"{len(own.unreadable)} files of {name} cannot be read ({own.unreadable[0]})")
        if name != reference:
            report = distances(read[reference].statistics, own.statistics)
            rows[name]["distances"] = report.values
            warnings += [text for text in report.warnings if text not in warnings]
    if len({size for own in read.values() for size in own.sizes}) > 1:
        warnings.append("the images have several sizes, and a distance also sees how each was scaled")
    about = {**describe(extractor), "folders": {name: str(path.resolve()) for name, path in folders.items()}}
    return {"reference": reference, "rows": rows, "warnings": warnings, "provenance": {**about, "versions": versions()}}


def table(content: Mapping[str, Any]) -> str:
    """Format what :func:`compare_folders` found as Markdown."""
    rows, reference = content["rows"], content["reference"]
    columns = list(next(row["distances"] for row in rows.values() if "distances" in row))
    lines = head(["", "images", "sizes", *columns])
    for name, row in rows.items():
        sizes = sorted(row["sizes"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{size} ({count})" for size, count in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
        values = [f"{row['distances'][column]:.4g}" if "distances" in row else "" for column in columns]
        lines.append(line([f"{name} (reference)" if name == reference else name, str(row["images"]), shown, *values]))
    return "\n".join([*lines, "", LEFT_OUT])
