"""``localctl cache``: encode images and captions of a dataset once, by any number of processes, for any number of
trainings.

For each kind of encodings: find what is missing, encode it in workers that write finished rows as parquet files, then
copy the rows in the order of the dataset to the files that training reads. A run that was stopped or killed continues
from the finished rows. Ray Data's ``CheckpointConfig`` is not used: it believes its own list of finished ids, while
here the rows themselves are checked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from localctl.architectures import read_shape
from localctl.caching.run import run_workers
from localctl.caching.settings import CacheSettings
from localctl.caching.workers import FACTS, PROBLEM, Work, rows_of
from localctl.data.bad_rows import BadRow, count_reasons
from localctl.data.bad_rows import Problem as DataProblem
from localctl.data.files import FileSource
from localctl.data.image_sizes import image_sizes
from localctl.data.sample import Source
from localctl.denoisers.abilities import Abilities
from localctl.encodings.captions import captions_of_all
from localctl.encodings.recipes import CONDITIONS, ENCODERS, IMAGES, TEXTS, Recipes
from localctl.encodings.source import caption_id, content_of, files_of, image_ids
from localctl.encodings.store import (
    EncodedRow,
    Manifest,
    Problem,
    Store,
    folder_of,
    write_shards,
)
from localctl.files import read_object, remove
from localctl.lock import FolderLock
from localctl.signals import Interrupt
from localctl.training.data import make_source
from localctl.training.encoded import recipe_of, recipes_of
from localctl.training.settings import TrainSettings

logger = logging.getLogger(__name__)
PARTS = ".parts"
_LOOKED_AT = 32  # scenes that are rendered again to see whether they have changed


@dataclass(frozen=True)
class CacheResult:
    """The outcome. rows: kind -> number of stored rows. encoded: rows that this run added. problems: rows that cannot
    be encoded. signal: number of the signal that stopped the run early, or 0."""

    folder: Path
    rows: dict[str, int]
    encoded: int
    problems: tuple[Problem, ...] = ()
    signal: int = 0


@dataclass
class Plan:
    """What is to be encoded of one kind. items: id -> what workers need to know of the row, in order. stale: rows whose
    image has changed since."""

    kind: str
    folder: Path
    manifest: Manifest
    items: dict[bytes, tuple[Any, ...]] = field(default_factory=dict)
    stale: int = 0


@dataclass(frozen=True)
class Examples:
    """A dataset as workers open it (``source``), and as training uses it, which may be in buckets (``used``)."""

    source: Source
    used: Source

    @classmethod
    def of(cls, source: Source, root: Path) -> Examples:
        """Return the examples of ``source``; the sizes of images are stored in ``root``, if buckets need them."""
        if not isinstance(source, FileSource) or not source.data.buckets:
            return cls(source, source)
        sizes = image_sizes(source.rows, source.indices, source.data.max_pixels, root)
        return cls(source, source.in_buckets(sizes))

    def place(self, index: int) -> int:
        """Return the number in ``source`` of example ``index`` of ``used``."""
        if self.used is self.source:
            return index
        assert isinstance(self.source, FileSource) and isinstance(self.used, FileSource)
        return int(np.searchsorted(self.source.indices, self.used.indices[index]))

    def size(self, index: int) -> tuple[int, int] | None:
        """Return the (height, width) to which example ``index`` is brought, if it has one of its own."""
        return self.used.size(index) if isinstance(self.used, FileSource) else None


def check_place(settings: TrainSettings) -> Path:
    """Return the folder of the encodings. ValueError if the settings name none, or more tokens than the base reads."""
    if settings.data.encodings_dir is None:
        raise ValueError("The encodings need a folder; pass --encodings_dir FOLDER, to this and to the training.")
    if settings.max_sequence_length is not None:
        Abilities(settings.base, read_shape(settings.base)).check_text_length(settings.max_sequence_length, "")
    return Path(settings.data.encodings_dir).expanduser().absolute()


def cache(settings: CacheSettings) -> CacheResult:
    """Encode what is missing. ValueError for settings that cannot work; OSError if a file cannot be written."""
    root = check_place(settings)
    kinds = (IMAGES, CONDITIONS, TEXTS) if settings.cache_conditions else (IMAGES, TEXTS)
    settings = replace(settings, data=replace(settings.data, encodings_dir=None))
    recipes = recipes_of(settings)
    source = make_source(settings, "train")
    result = CacheResult(root, {}, 0)
    with ExitStack() as stack:
        stack.callback(FolderLock(root, flag="--encodings_dir").release)
        interrupt = stack.enter_context(Interrupt())
        examples = Examples.of(source, root)
        for kind in kinds:
            result = _cache_kind(settings, recipes, examples, kind, result, interrupt)
            if result.signal:
                break
    return result


def _cache_kind(
    settings: CacheSettings, recipes: Recipes, examples: Examples, kind: str, so_far: CacheResult, interrupt: Interrupt
) -> CacheResult:
    plan = make_plan(settings, recipes, examples, so_far.folder, kind)
    parts = plan.folder / PARTS
    finished = finished_rows(parts, plan.items)
    work = Work(settings, kind, settings.precision, parts)
    missing = {id: item for id, item in plan.items.items() if id not in finished}
    if finished:
        logger.info(f"{kind:<11} {len(finished)} of {len(plan.items)} were encoded before, by a run that was stopped.")
    if missing and not interrupt.signal:
        parts.mkdir(parents=True, exist_ok=True)
        run_workers(work, missing, settings.num_workers, interrupt)
        finished = finished_rows(parts, plan.items)
    if interrupt.signal:
        return replace(so_far, signal=interrupt.signal)
    problems = _finish(plan, finished, settings)
    rows = so_far.rows | {kind: sum(shard["rows"] for shard in plan.manifest.shards)}
    encoded = len(plan.items) - len(problems)
    logger.info(_summary(plan, rows[kind], encoded, problems))
    return replace(so_far, rows=rows, encoded=so_far.encoded + encoded, problems=(*so_far.problems, *problems))


def make_plan(settings: CacheSettings, recipes: Recipes, examples: Examples, root: Path, kind: str) -> Plan:
    """Find what is to be encoded of a kind. Files that are damaged are forgotten; their rows are missing then."""
    recipe = recipe_of(recipes, kind)
    folder = folder_of(root, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(kind, folder, Manifest(recipe))
    wanted = _wanted(settings, recipes, examples, root, kind)
    if (folder / "manifest.json").exists():
        plan.manifest = Manifest.read(folder)
        _forget_damaged(plan)
        plan.manifest.write(folder)
        known = _known(plan, examples.source, wanted)
        plan.stale = sum(state == "stale" for state in known.values())
        wanted = {id: item for id, item in wanted.items() if known[id] != "stored"}
    plan.items = wanted
    return plan


def _wanted(
    settings: CacheSettings, recipes: Recipes, examples: Examples, root: Path, kind: str
) -> dict[bytes, tuple[Any, ...]]:
    """Return id -> what workers need to know, of all rows of the dataset."""
    if kind == TEXTS:
        images = folder_of(root, recipe_of(recipes, IMAGES))
        captions = captions_of_all(examples.used, settings.seed, settings.num_variants, images)
        return {caption_id(caption): (caption,) for caption in captions}
    variants = range(settings.num_variants if recipes.varies else 1)
    ids = image_ids(examples.used, variants)
    return {id: (examples.place(index), variant, examples.size(index)) for id, index, variant in ids}


def _forget_damaged(plan: Plan) -> None:
    """Remove files that are missing, cut off or changed from the manifest, and from the disk."""
    shards = plan.manifest.shards
    whole = [s for s in shards if (p := plan.folder / s["name"]).is_file() and p.stat().st_size == s["bytes"]]
    plan.manifest.shards = whole
    plan.manifest.write(plan.folder)
    bar = tqdm(whole, desc=f"checking {plan.kind}", unit="file", leave=False)
    damaged = Store(plan.folder).damaged(lambda _: bar)
    plan.manifest.shards = [shard for shard in whole if shard["name"] not in damaged]
    lost = [shard for shard in shards if shard not in plan.manifest.shards]
    for shard in lost:
        remove(plan.folder / shard["name"])
    if lost:
        rows = sum(shard["rows"] for shard in lost)
        names = ", ".join(shard["name"] for shard in lost[:3])
        logger.warning(
            f"{len(lost)} files of {plan.kind} are damaged or missing ({names}); their {rows} rows are redone."
        )


def _known(plan: Plan, source: Source, wanted: dict[bytes, tuple[Any, ...]]) -> dict[bytes, str]:
    """Return for each wanted id whether it is ``stored``, ``missing``, or ``stale``: encoded from another image."""
    store = Store(plan.folder)
    ids = list(wanted)
    state = dict(zip(ids, ("stored" if there else "missing" for there in store.has(ids)), strict=True))
    there = [id for id in ids if state[id] == "stored"]
    if plan.kind == TEXTS or not there:
        return state
    if not isinstance(source, FileSource):  # scenes: all of them change with their code, or none
        some = there[:: max(1, len(there) // _LOOKED_AT)]
        same = store.contents(some) == [content_of(source, wanted[id][0]) for id in some]
        return state if same else state | dict.fromkeys(there, "stale")

    def content(id: bytes) -> bytes | None:
        try:
            return (files_of if plan.kind == CONDITIONS else content_of)(source, wanted[id][0])
        except (BadRow, OSError):
            return None  # a worker will name it

    with ThreadPoolExecutor() as pool:
        now = tqdm(pool.map(content, there), total=len(there), desc="comparing files", unit="file", leave=False)
        pairs = zip(there, now, store.contents(there), strict=True)
        return state | {id: "stale" for id, new, old in pairs if new != old}


def finished_rows(parts: Path, wanted: Any) -> dict[bytes, tuple[Path, int]]:
    """Return id -> (file, row) of the wanted rows that a run has finished, except problems of earlier runs. A file that
    cannot be read, or with a row that has changed, is removed."""
    found: dict[bytes, tuple[Path, int]] = {}
    for path in sorted(parts.glob("*")):
        rows = _read_part(path)
        if rows is None:
            remove(path)
            continue
        found |= {row.id: (path, number) for number, row in enumerate(rows) if row.id in wanted}
    return found


def _read_part(path: Path) -> list[EncodedRow] | None:
    if path.suffix != ".parquet":  # not finished
        return None
    try:
        table = pq.read_table(path)
        rows = rows_of(table)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    return rows if [row.check for row in rows] == table.column("check").to_pylist() else None


def _finish(plan: Plan, finished: dict[bytes, tuple[Path, int]], settings: CacheSettings) -> list[Problem]:
    """Copy the finished rows in order to the files that training reads, then name these in the manifest."""
    lost = [id for id in plan.items if id not in finished]
    if lost:
        raise OSError(f"{len(lost)} rows of {plan.kind} were encoded but cannot be read again; run the same again.")
    problems: list[Problem] = []
    manifest = plan.manifest
    names = [shard["name"] for shard in manifest.shards]
    manifest.shards += write_shards(plan.folder, _in_order(plan, finished, problems), names)
    manifest.problems = problems
    manifest.variants = settings.num_variants
    if ENCODERS[plan.kind] and (plan.folder / FACTS).exists():
        manifest.facts = read_object(plan.folder / FACTS, "The facts")
    manifest.write(plan.folder)
    remove(plan.folder / PARTS)
    return problems


def _in_order(plan: Plan, finished: dict[bytes, tuple[Path, int]], problems: list[Problem]) -> Iterator[EncodedRow]:
    path, rows = None, []
    for id in plan.items:
        if finished[id][0] != path:
            path = finished[id][0]
            rows = _read_part(path) or []
        row = rows[finished[id][1]]
        if PROBLEM in row.about:
            problems.append(Problem(*row.about[PROBLEM]))
        else:
            yield row


def _summary(plan: Plan, rows: int, encoded: int, problems: Sequence[Problem]) -> str:
    size = sum(shard["bytes"] for shard in plan.manifest.shards)
    text = f"{plan.kind:<11} {rows} rows, {size / 1e6:.1f} MB, {encoded} of them new, in {plan.folder}"
    if plan.stale:
        text += f"; {plan.stale} images have changed and were encoded again"
    if problems:
        reasons = count_reasons([DataProblem(*problem) for problem in problems])
        first = "; ".join(f"{problem.key}: {problem.detail}" for problem in problems[:3])
        text += f"; {len(problems)} cannot be encoded ({reasons}): {first}"
    return text
