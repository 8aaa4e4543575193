"""The harness of the studies: variants x cases -> images -> figures per image -> one stored result per variant.

A :class:`Study` records the settings of each variant, refuses results and images made with other settings, and
resumes where it was stopped. Pages are written from its results alone (``research.page``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from diffusers import DiffusionPipeline
from tqdm import tqdm

from localctl.control.base import Control
from localctl.evaluation.provenance import REQUIRED, check_provenance, read_json, versions, write_bytes, write_text
from localctl.images import load_image, png_bytes
from localctl.jobs.variants import file_label
from localctl.layout import Layout
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP, Extractor, describe, load_extractor
from localctl.metrics.statistics import FeatureStatistics, Statistics
from localctl.micro.detect import VERSION
from localctl.micro.scenes import SIZE, Scene, scene
from localctl.pipelines import resolve_base
from localctl.sampling import generate
from research import flags
from research.bases import sha256_of_base

logger = logging.getLogger(__name__)
PROFILE, SPLIT = "basic", "test"  # of the scenes in all studies
DIGITS = 5  # after the point, in stored figures
# Results without a hash of the base are of the first generation of the embedded one.
FIRST_BASE = "c80829270fb096f8b84b10ee24900c06db48b1fbb8533e3be8b221d5f2b785ab"
FORMER_BASES = {FIRST_BASE: "first", "4b0df551dd8ee43143c3b32146d75525cf83d8d0cd09358266de65024e6a4b23": "second"}


@dataclass(frozen=True)
class Case:
    """What one image is generated from and measured against. id: names the scene; seed: that of the noise."""

    id: str
    item: Scene = field(compare=False)
    layout: Layout
    seed: int


def first_scenes(number: int, wanted: Callable[[Scene], bool], split: str = SPLIT) -> list[Scene]:
    """Return the first ``number`` scenes of a split for which ``wanted`` is true."""
    return list(islice(filter(wanted, (scene(index, PROFILE, split) for index in count())), number))


def generate_cases(
    pipe: DiffusionPipeline,
    cases: Sequence[Case],
    controls: Callable[[Sequence[Case]], Sequence[Control]],
    batch_size: int,
    name: str,
    files: Sequence[Path] = (),
    progress_bar: bool = True,
    **options: Any,
) -> list[np.ndarray]:
    """Return an image uint8 (H,W,3) for each case, generated from the noise of its own seed.

    The batches do not depend on which images exist already, so a resumed run gives the same bytes as an uninterrupted
    one.

    Args:
        controls: returns the controls of a batch.
        name: name of the variant, for the progress bar.
        files: one path per case to store its image; existing images are read instead of generated.
        progress_bar: whether to show one; if not, a line is logged after each batch.
        options: passed to :func:`localctl.sampling.generate`.
    """
    missing = {index for index in range(len(cases)) if not files or not files[index].is_file()}
    images: dict[int, np.ndarray] = {}
    hidden = {} if progress_bar else {"disable": True}  # where shown, TQDM_DISABLE decides
    with tqdm(total=len(cases), desc=f"generating {name}", unit="image", **hidden) as bar:
        for first in range(0, len(cases), batch_size):
            batch = range(first, min(first + batch_size, len(cases)))
            wanted = [index for index in batch if index in missing]
            if wanted:
                some = [cases[index] for index in batch]
                layouts, seeds = [case.layout for case in some], [case.seed for case in some]
                output = generate(pipe, layouts, controls(some), seeds, paired=True, batch_size=batch_size, **options)
                for index in wanted:
                    image = output.images[index - first]
                    images[index] = np.asarray(image)
                    if files:
                        write_bytes(files[index], png_bytes(image))
                if not progress_bar:
                    logger.info(f"{name}: {len(images)} of {len(missing)} images")
            bar.update(len(batch))
    return [images[index] if index in images else np.asarray(load_image(files[index])) for index in range(len(cases))]


@dataclass(frozen=True)
class Result:
    """A measured variant.

    samples: (n, k), one row per image and one column per figure, NaN = undefined. about: the other fields of its file;
    ``result["asked"]`` is None if the file has no such field.
    """

    name: str
    ids: tuple[str, ...]
    columns: tuple[str, ...]
    samples: np.ndarray
    about: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.about.get(key)

    def column(self, name: str) -> np.ndarray:
        """Return the values of one figure, (n,), NaN where undefined."""
        return self.samples[:, self.columns.index(name)]


def read_results(
    folder: Path, what: str, needed: Sequence[str], way: Callable[[Mapping[str, Any]], Any]
) -> dict[str, Result]:
    """Return the results in ``folder`` by name.

    Args:
        what: the study, for error messages.
        needed: fields that every result must have.
        way: returns, from a result's settings, those that must agree between all results.

    Raises:
        ValueError: a result is damaged or from another study, or results were measured in different ways.
    """
    results: dict[str, Result] = {}
    ways = set()
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, "result")
        missing = [key for key in ("asked", "name", *needed) if key not in content]
        if missing:
            raise ValueError(f"{path} is not a result of {what} (it has no {missing[0]}); remove it.")
        if not content.get("failed"):
            check_provenance(content["name"], content, REQUIRED)
        ids, columns = tuple(content.get("ids", ())), tuple(content.get("columns", ()))
        results[content["name"]] = Result(content["name"], ids, columns, as_table(content.get("samples", [])), content)
        ways.add(repr((way(content["asked"]), reader_version(content["asked"]))))
    if len(ways) > 1:
        raise ValueError(f"The results in {folder} were measured in different ways; measure them again in one way.")
    return results


def as_table(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Return rows as read from JSON as a float64 array (n, k), with NaN for null."""
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def as_rows(table: np.ndarray, digits: int | None = DIGITS) -> list[list[float | None]]:
    """Return the inverse of :func:`as_table`, rounded to ``digits`` (None: not rounded)."""
    whole = (lambda value: value) if digits is None else (lambda value: round(value, digits))
    return [[None if value != value else whole(value) for value in row] for row in table.tolist()]


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON with one line per field, and one line per row of its tables."""
    write_text(path, _lines(content) + "\n")


def _lines(value: Any) -> str:
    if isinstance(value, Mapping) and any(_has_rows(item) for item in value.values()):
        fields = (f"{json.dumps(key, ensure_ascii=False)}: {_lines(value[key])}" for key in sorted(value))
        return "{\n" + ",\n".join(fields) + "\n}"
    if _is_table(value):
        return "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)


def _has_rows(value: Any) -> bool:
    return _is_table(value) or (isinstance(value, Mapping) and any(map(_has_rows, value.values())))


def reader_version(asked: Mapping[str, Any]) -> int:
    """Return the version of the micro scene reader behind a result; results without one are of version 1."""
    return int(asked.get("reader", 1))


def check_reader(folder: Path, waiting: Sequence[str]) -> None:
    """Raise ValueError if ``folder`` has results of another version of the reader than those in ``waiting`` will be."""
    there = {reader_version(read_json(path, "result").get("asked", {})) for path in folder.glob("*.json")}
    if waiting and there - {VERSION}:
        raise ValueError(
            f"The results in {folder} were measured with version {min(there)} of the reader of micro scenes, which is "
            f"now at version {VERSION}; choose another --report for {', '.join(waiting)}, or remove them."
        )


def check_same(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any], instead: str) -> None:
    """Raise ValueError, naming what differs, if ``path`` was made with settings ``there``, not with those ``asked``."""
    changed = sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key))
    if changed:
        raise ValueError(f"{path} was made with another {', '.join(changed)}; choose {instead}, or remove it.")


class Variant(Protocol):
    """What a study compares; ``name`` names its files and its rows in tables."""

    @property
    def name(self) -> str: ...


V = TypeVar("V", bound=Variant)


class Study(Generic[V]):
    """Measures variants by one protocol.

    ``folder`` holds the results, ``work`` the images and trainings behind them. A subclass defines the settings of a
    variant (:meth:`asked`) and how it is :meth:`measured`.
    """

    def __init__(self, protocol: flags.Protocol, folder: Path, work: Path) -> None:
        self.protocol, self.folder, self.work = protocol, folder, work
        self.base = Path(resolve_base(protocol.base).id_or_path)

    @cached_property
    def base_sha256(self) -> str:
        return sha256_of_base(self.base)

    @cached_property
    def clip(self) -> Clip:
        return Clip(MICRO_CLIP)

    @cached_property
    def extractors(self) -> list[Extractor]:
        return [load_extractor(name) for name in self.protocol.extractors]

    def asked(self, variant: V) -> dict[str, Any]:
        """Return all that a result depends on, as JSON would read it back."""
        return {"protocol": self.protocol.plain(), "reader": VERSION, "base_sha256": self.base_sha256}

    def earlier(self, variant: V, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of an existing result; subclasses add the defaults of settings newer than the result."""
        return {"base_sha256": FIRST_BASE, **content.get("asked", {})}

    def measured(self, variant: V) -> dict[str, Any]:
        """Generate and measure; return the fields of the result besides its name and settings."""
        raise NotImplementedError

    def file(self, name: str) -> Path:
        """Return the path of the result of this name."""
        return self.folder / f"{file_label(name)}.json"

    def strip(self, name: str) -> Path:
        """Return the path of the strip of its images that pages show."""
        return self.folder / f"{file_label(name)}.png"

    def done(self, variant: V) -> bool:
        """Return whether the variant has a result. Raises ValueError if it has other settings, or these are invalid."""
        path, asked = self.file(variant.name), self.asked(variant)
        if not path.is_file():
            return False
        there = {**self.earlier(variant, read_json(path, "result")), "reader": VERSION}
        check_same(path, there, asked, "another --report")
        return True

    def check(self, variants: Sequence[V]) -> None:
        """Check the results in the folder before measuring.

        Raises:
            ValueError: a variant has a result of other settings, or results of another version of the reader are in
                the folder.
        """
        check_reader(self.folder, [variant.name for variant in variants if not self.done(variant)])

    def measure(self, variant: V) -> bool:
        """Measure a variant unless it has a result; return whether it had none. Raises ValueError as :meth:`check`."""
        if self.done(variant):
            logger.info(f"{variant.name}: done before")
            return False
        asked = self.asked(variant)
        content = {"asked": asked, "name": variant.name, **self.measured(variant)}
        if not content.get("failed"):
            check_provenance(variant.name, content, REQUIRED)
        write_result(self.file(variant.name), content)
        logger.info(f"{variant.name}: {content.get('failed') or self.file(variant.name)}")
        return True

    def run(self, variants: Sequence[V], write_page: Callable[[], Any]) -> None:
        """Measure the variants that have no result, and write the page after each."""
        self.check(variants)
        for variant in variants:
            if self.measure(variant):
                write_page()
        write_page()


def statistics_of(
    extractor: Extractor,
    keys: Sequence[str],
    image: Callable[[int], np.ndarray],
    batch_size: int,
    about: Mapping[str, Any],
) -> Statistics:
    """Return the feature statistics of a set of images.

    keys: one per image. image: returns an image uint8 (H,W,3) by its number. about: provenance of the images.
    """
    metric = FeatureStatistics(extractor.dim)
    for first in range(0, len(keys), batch_size):
        batch = keys[first : first + batch_size]
        metric.update(extractor(np.stack([image(first + number) for number in range(len(batch))])), batch)
    return metric.statistics(**{**about, **describe(extractor)})


def provenance(
    metrics: Sequence[str], real: int, fake: Any, mask_protocol: Any, seeds: Any, **more: Any
) -> dict[str, Any]:
    """Return the provenance that every result of a study records, and ``more``."""
    return {
        "metrics": list(metrics),
        "n_real": real,
        "n_fake": fake,
        "image_format": "PNG, 8 bit RGB",
        "image_size": [SIZE, SIZE],
        "mask_protocol": mask_protocol,
        "seeds": seeds,
        "versions": versions(),
        **more,
    }


def former_base(asked: Mapping[str, Any]) -> str | None:
    """Return the generation of the embedded base that a result is of, None if it is not a former one."""
    return FORMER_BASES.get(asked.get("base_sha256", FIRST_BASE)) if asked["protocol"]["base"] == "micro" else None
