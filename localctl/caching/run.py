"""Run the workers of ``localctl cache`` with Ray Data: read -> encode -> write, on one machine or many."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from localctl.caching.workers import Encoder, Reader, Work, Writer
from localctl.cluster import available_cpus, connected
from localctl.encodings.recipes import CONDITIONS, TEXTS
from localctl.encodings.store import EncodedRow, as_batch
from localctl.files import first_line
from localctl.signals import Interrupt

_PLACES = pa.schema(
    [("id", pa.binary()), ("index", pa.int64()), ("variant", pa.int64()), ("size", pa.list_(pa.int64()))]
)
_ERROR = re.compile(r"[\w.]+(Error|Exception): ")
BLOCK_GROUPS = 4  # groups in a block: a block is what a worker does at a time, and loses when it is killed


@dataclass(frozen=True)
class Workers:
    """How many processes encode and read, and the GPUs of each encoder."""

    encoders: int
    readers: int
    gpus: int

    @classmethod
    def on(cls, ray: Any, wanted: int | None) -> Workers:
        """Return one encoder per GPU, or without GPUs per CPU, and readers on all other CPUs. ValueError if there are
        fewer GPUs than encoders ``wanted``."""
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), max(1, int(there.get("CPU", 1)))
        if gpus and wanted is not None and wanted > gpus:
            raise ValueError(f"num_workers={wanted} needs as many GPUs, but Ray finds {gpus}; lower it.")
        encoders = wanted or gpus or min(cpus, available_cpus())
        return cls(encoders, max(1, cpus - encoders) if gpus else max(1, min(encoders, cpus)), 1 if gpus else 0)


def run_workers(work: Work, items: Mapping[bytes, tuple[Any, ...]], wanted: int | None, interrupt: Interrupt) -> None:
    """Encode ``items`` (id -> index and variant of an image, or a caption) and write the rows to ``work.parts``. After
    a signal, end early: rows that are written stay. wanted: number of processes; 0 = this one alone, without Ray.

    Raises:
        ValueError: Ray is missing or cannot be used.
        OSError: a file could not be written, or a worker failed.
    """
    bar = tqdm(total=len(items), desc=f"encoding {work.kind}", unit="row", mininterval=1)
    if wanted == 0:
        _drain(_here(work, items), bar, interrupt)
        return
    with connected(cpus=2 * (wanted or available_cpus()) + 2) as ray:
        dataset = _pipeline(ray, work, items, Workers.on(ray, wanted))
        try:
            finished = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            _drain(finished, bar, interrupt)
        except ray.exceptions.RayError as error:
            raise _failure(work.kind, error) from error


def _drain(finished: Iterable[pa.Table], bar: Any, interrupt: Interrupt) -> None:
    """Wait for all rows, or until a signal."""
    with bar:
        for counts in finished:
            bar.update(sum(counts.column("rows").to_pylist()))
            if interrupt.signal:
                return


def _here(work: Work, items: Mapping[bytes, tuple[Any, ...]]) -> Iterator[pa.Table]:
    """Do the work in this process."""
    read = None if work.kind == TEXTS else Reader(work)
    write = Writer(work) if work.kind == CONDITIONS else Encoder(work)
    for block in _blocks(work, items):
        yield write(block if read is None else read(block))


def _pipeline(ray: Any, work: Work, items: Mapping[bytes, tuple[Any, ...]], workers: Workers) -> Any:
    blocks = list(_blocks(work, items, workers.encoders))
    dataset = ray.data.from_arrow(blocks)
    pool = ray.data.ActorPoolStrategy
    common: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None, "fn_constructor_args": (work,)}
    if work.kind != TEXTS:
        readers = pool(min_size=1, max_size=min(workers.readers, len(blocks)))
        dataset = dataset.map_batches(Reader, compute=readers, num_cpus=1, **common)
    if work.kind == CONDITIONS:
        return dataset.map_batches(Writer, compute=pool(size=1), num_cpus=0.5, **common)
    place = {"num_gpus": workers.gpus} if workers.gpus else {"num_cpus": 1}
    return dataset.map_batches(Encoder, compute=pool(size=min(workers.encoders, len(blocks))), **place, **common)


def _blocks(work: Work, items: Mapping[bytes, tuple[Any, ...]], workers: int = 1) -> Iterator[pa.Table]:
    """Yield the items in tables of a few groups each: those that a worker takes at a time."""
    groups = min(BLOCK_GROUPS, max(1, len(items) // (work.group * workers)))
    size, every = groups * work.group, list(items.items())
    for start in range(0, len(every), size):
        part = every[start : start + size]
        if work.kind == TEXTS:
            rows = [EncodedRow(id, id, {"caption": caption}, b"") for id, (caption,) in part]
            yield pa.Table.from_batches([as_batch(rows)])
        else:
            ids, columns = [id for id, _ in part], zip(*(item for _, item in part), strict=True)
            named = dict(zip(("index", "variant", "size"), columns, strict=True))
            yield pa.table({"id": ids, **named}, schema=_PLACES)


def _failure(kind: str, error: Exception) -> OSError:
    """Return the first cause of an error of Ray as an OSError in one sentence."""
    cause: BaseException = error
    while isinstance(inner := getattr(cause, "cause", None) or cause.__cause__, BaseException):
        cause = inner
    if isinstance(cause, OSError):
        return OSError(str(cause))
    lines = str(cause).strip().splitlines()  # of a worker that could not start: its traceback
    what = next(
        (line for line in reversed(lines) if _ERROR.match(line)), f"{type(cause).__name__}: {first_line(cause)}"
    )
    finished = "what is encoded stays, the same command goes on from there"
    return OSError(f"A worker that encodes {kind} failed ({what[:300].rstrip('.')}); {finished}.")
