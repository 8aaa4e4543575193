"""Compare sets of images that were generated from the same examples, masks and noise.

Every generated image is measured against the image that its condition was extracted from. The base without an adapter
is the floor of every control metric, the true images after a round trip through the VAE are its ceiling.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from localctl.evaluation.generated_set import Speed, read_set, read_speed
from localctl.evaluation.measuring import CEILING, Measurer, Rows, TargetReader, settings_of
from localctl.evaluation.provenance import read_json, versions
from localctl.evaluation.settings import FidSettings
from localctl.evaluation.workers import spread
from localctl.files import sha256_of_files, sha256_of_folder
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.metrics.clip import Clip
from localctl.metrics.edges import YARDSTICK
from localctl.metrics.extractors import ClipExtractor, describe
from localctl.pipelines import resolve_base

Cached = Callable[[Mapping[str, Any], Callable[[], dict[str, Rows]]], dict[str, Rows]]
Tables = dict[str, tuple[tuple[str, ...], np.ndarray]]  # columns and values (n, k) by the name of the set
LOWER_IS_BETTER = ("lfmse_in", "hallucination_in", "hallucination_out", "leak")
_AT_ONCE = 16  # images, as many as go through the VAE at once
_SAME = ("base", "data", "condition", "mask", "part", "num_images", "seed", "sample", "set", "num_inference_steps") + (
    "guidance_scale",
    "scheduler",
)


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


def compare(
    folders: Mapping[str, Path],
    clip: Clip | None = None,
    cached: Cached | None = None,
    num_workers: int | None = None,
) -> Comparison:
    """Measure sets of generated images.

    Args:
        folders: the folder of each set, by name.
        clip: the CLIP that computes the CLIP score; None: no CLIP score.
        cached: returns the values of floor and ceiling for what they depend on, and calls the function that measures
            them where it has none; None: they are measured anew.
        num_workers: number of Ray workers to share the images; None: this process measures them.

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

    def measured(*names: str) -> Tables:
        make = partial(Measurer, settings, {name: folders.get(name) for name in names}, folders[floor])
        pieces = [ids[first : first + _AT_ONCE] for first in range(0, len(ids), _AT_ONCE)]
        in_worker = partial(make, None if clip is None else clip.folder)
        return _tables(spread(make(clip), in_worker, pieces, num_workers))

    if cached is None:
        tables = measured(*folders, CEILING)
    else:
        depends_on = _depends_on(folders[floor], floor, ids, settings, clip)
        bounds = cached(depends_on, lambda: _rows(measured(floor, CEILING)))
        tables = _tables([bounds])
        if others := [name for name in folders if name != floor]:
            tables |= measured(*others)
    columns = tables[CEILING][0]
    speeds = {name: speed for name, folder in folders.items() if (speed := read_speed(folder)) is not None}
    values = {name: tables[name][1] for name in (*folders, CEILING)}
    provenance = _provenance(columns, sets, ids, clip)
    return Comparison(columns, values, ids, floor, provenance, speeds, time.perf_counter() - began)


def _tables(parts: Iterable[Mapping[str, Rows]]) -> Tables:
    """Join rows of values, part after part. Numbers take a tenth of the memory of rows."""
    columns: dict[str, tuple[str, ...]] = {}
    values: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, rows in part.items():
            order = columns.setdefault(name, tuple(rows[0]))
            values.setdefault(name, []).append(np.array([[row[column] for column in order] for row in rows]))
    return {name: (order, np.concatenate(values[name])) for name, order in columns.items()}


def _rows(tables: Tables) -> dict[str, Rows]:
    return {
        name: [dict(zip(columns, row, strict=True)) for row in values.tolist()]
        for name, (columns, values) in tables.items()
    }


def _depends_on(
    folder: Path, name: str, ids: Sequence[str], settings: FidSettings, clip: Clip | None
) -> dict[str, Any]:
    """Return what the values of floor and ceiling depend on besides the code: settings, images, masks and captions of
    the floor, the true images, and the weights of the VAE and the CLIP."""
    parts = (("images", "png"), ("masks", "png"), ("ids", "json"))
    files = [folder / part / f"{number}.{kind}" for number in ids for part, kind in parts]
    images = hashlib.sha256()
    for target in TargetReader(settings).read(folder, ids):
        images.update(target.image.tobytes())
    base = settings.base
    return {
        "name": name,
        "settings": read_json(folder / "settings.json", "settings of the generated images"),
        "files_sha256": sha256_of_files(files, folder),
        "targets_sha256": images.hexdigest(),
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


def _provenance(
    columns: Sequence[str], sets: Mapping[str, tuple[dict[str, Any], list[str]]], ids: Sequence[str], clip: Any
) -> dict[str, Any]:
    settings = next(iter(sets.values()))[0]
    return {
        "metrics": list(columns),
        "n_real": len(ids),
        "n_fake": len(ids),
        "image_format": "PNG, 8 bit RGB",
        "image_size": list(settings_of(settings).data.size),
        "edges": YARDSTICK,
        "clip": None if clip is None else describe(ClipExtractor(clip, "clip_score")),
        "mask_protocol": {"mask": settings["mask"], "stored": "masks/ID.png, the same for every set"},
        "seeds": {"seed": settings["seed"], "picture": "hash of seed and index, the same for every set"},
        "versions": versions(),
        "sets": {name: made_with for name, (made_with, _) in sets.items()},
    }
