"""A store of encoded rows: Arrow files of fixed rows, a manifest that names them, and checksums.

Rows are read by id in any order, from memory-mapped files: only the rows in use are in memory, and processes share it.
A file counts only once the manifest names it, with its size and SHA-256; both are written atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from localctl.files import first_line, read_object, remove, sha256, sha256_of_json, write_json, writing

VERSION = 1
MANIFEST = "manifest.json"
REPAIR = "run `localctl cache` with the same flags to repair it"
ID_BYTES = 16
SHARD_BYTES = 128 * 2**20  # of a file, which is repaired as a whole
SCHEMA = pa.schema(
    [
        ("id", pa.binary(ID_BYTES)),
        ("content", pa.binary(ID_BYTES)),
        ("check", pa.uint32()),
        ("about", pa.string()),
        ("payload", pa.large_binary()),
    ]
)


def hashed(*parts: str | bytes) -> bytes:
    """Return 16 bytes that identify ``parts``; their lengths go into the hash."""
    digest = hashlib.blake2b(digest_size=ID_BYTES)
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode() + data)
    return digest.digest()


class DamagedRow(ValueError):
    """The bytes of a row are not those that were written."""


class EncodedRow(NamedTuple):
    """An encoded row.

    id, content: 16 bytes, of its name and of what was encoded. about: small facts as JSON, such as shapes. payload: the
    numbers.
    """

    id: bytes
    content: bytes
    about: dict[str, Any]
    payload: bytes

    @property
    def check(self) -> int:
        """The checksum of the whole row."""
        return checksum(self.id, self.content, json.dumps(self.about), self.payload)


def checksum(id: bytes, content: bytes, about: str, payload: Any) -> int:
    """Return the CRC-32 of a row."""
    return zlib.crc32(payload, zlib.crc32(about.encode(), zlib.crc32(id + content)))


class Problem(NamedTuple):
    """A row that could not be encoded, and why."""

    key: str
    reason: str
    detail: str


@dataclass
class Manifest:
    """What a folder of encodings holds.

    recipe: all that the encodings depend on but the rows themselves. shards: name, rows, bytes and sha256 of each file.
    problems: of the last run. facts: what trainings record of the encoders. variants: encodings of each row.
    """

    recipe: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    variants: int = 1
    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of ``folder``. ValueError if it is damaged or of another version."""
        damaged = "delete the folder and cache again"
        found = read_object(folder / MANIFEST, "The manifest", damaged)
        if found.get("version") != VERSION:
            raise ValueError(
                f"The encodings in {folder} are of version {found.get('version')}, not {VERSION}; {damaged}."
            )
        try:
            found["problems"] = [Problem(*problem) for problem in found["problems"]]
            return cls(**found)
        except (TypeError, KeyError) as error:
            raise ValueError(f"The manifest {folder / MANIFEST} is damaged ({first_line(error)}); {damaged}.") from None

    def write(self, folder: Path) -> None:
        """Write the manifest atomically."""
        write_json(folder / MANIFEST, asdict(self), indent=1)


def folder_of(root: Path, recipe: Mapping[str, Any]) -> Path:
    """Return the folder of the encodings of ``recipe`` below ``root``: another recipe has another one."""
    return root / str(recipe["kind"]) / sha256_of_json(recipe)[:16]


def recipes_in(root: Path, kind: str) -> list[dict[str, Any]]:
    """Return the recipes of all encodings of ``kind`` below ``root``."""
    found = sorted((root / kind).glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    return [Manifest.read(path.parent).recipe for path in found]


class Store:
    """The rows of a folder, read by id. ValueError if a file of the manifest is missing or has another size."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.read(folder)
        for shard in self.manifest.shards:
            _check_size(folder, shard)
        self._tables: dict[int, pa.RecordBatch] = {}
        self._owner = os.getpid()
        self._heads, self._places = self._index()

    def __len__(self) -> int:
        return len(self._heads)

    @property
    def ids(self) -> Iterator[bytes]:
        """The ids of all rows."""
        for shard, row in self._places:
            yield self._table(int(shard)).column("id")[int(row)].as_py()

    def has(self, ids: Sequence[bytes]) -> np.ndarray:
        """Return for each id whether it is stored, (n,) bool."""
        if not len(self._heads):
            return np.zeros(len(ids), bool)
        heads = _heads(b"".join(ids))
        places = np.searchsorted(self._heads, heads)
        return self._heads[np.minimum(places, len(self._heads) - 1)] == heads

    def contents(self, ids: Sequence[bytes]) -> list[bytes | None]:
        """Return the content of each id; None if it is not stored."""
        return [None if place is None else self._cell("content", place) for place in map(self._find, ids)]

    def get(self, id: bytes) -> EncodedRow | None:
        """Return the row ``id``, checked; None if it is not stored. DamagedRow if its bytes have changed."""
        place = self._find(id)
        if place is None:
            return None
        batch, row = self._table(place[0]), place[1]
        content, about = self._cell("content", place), batch.column("about")[row].as_py()
        payload = batch.column("payload")[row].as_buffer()
        if checksum(id, content, about, payload) != batch.column("check")[row].as_py():
            raise DamagedRow(f"the bytes of a row in {self._path(place[0])} have changed")
        return EncodedRow(id, content, json.loads(about), payload)

    def damaged(self, progress: Any = iter) -> list[str]:
        """Return the names of the files whose content is not what was written; reads all of them."""
        shards = self.manifest.shards
        return [s["name"] for s in progress(shards) if sha256(self.folder / s["name"]) != s["sha256"]]

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first 8 bytes of the ids, ascending, and (shard, row) of each. Of rows with the same id, the last
        counts."""
        heads, places = [], []
        for number in range(len(self.manifest.shards)):
            column = self._table(number).column("id")
            heads.append(_heads(column.buffers()[1].to_pybytes()[: len(column) * ID_BYTES]))
            rows = np.arange(len(column), dtype=np.int32)
            places.append(np.stack([np.full(len(column), number, np.int32), rows], axis=1))
        if not heads:
            return np.empty(0, np.uint64), np.empty((0, 2), np.int32)
        every, where = np.concatenate(heads)[::-1], np.concatenate(places)[::-1]
        unique, first = np.unique(every, return_index=True)
        return unique, where[first]

    def _find(self, id: bytes) -> tuple[int, int] | None:
        [head] = _heads(id)
        place = int(np.searchsorted(self._heads, head))
        if place == len(self._heads) or self._heads[place] != head:
            return None
        shard, row = (int(number) for number in self._places[place])
        return (shard, row) if self._cell("id", (shard, row)) == id else None

    def _cell(self, name: str, place: tuple[int, int]) -> bytes:
        return self._table(place[0]).column(name)[place[1]].as_py()

    def _path(self, number: int) -> Path:
        return self.folder / self.manifest.shards[number]["name"]

    def _table(self, number: int) -> pa.RecordBatch:
        if self._owner != os.getpid():  # in a forked worker
            self._tables, self._owner = {}, os.getpid()
        if number not in self._tables:
            try:
                file = pa.ipc.open_file(pa.memory_map(str(self._path(number))))
                self._tables[number] = file.get_batch(0)
            except (OSError, pa.ArrowException) as error:
                raise DamagedRow(f"{self._path(number)} cannot be read ({first_line(error)})") from None
        return self._tables[number]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_tables": {}, "_owner": -1}


def _heads(ids: bytes) -> np.ndarray:
    return np.frombuffer(ids, dtype=np.dtype(">u8"))[:: ID_BYTES // 8].astype(np.uint64)


def _check_size(folder: Path, shard: Mapping[str, Any]) -> None:
    path = folder / shard["name"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        state = "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}"
        raise ValueError(f"The file {path} of encodings {state}; {REPAIR}.")


def write_shards(folder: Path, rows: Iterable[EncodedRow], taken: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Write ``rows`` to new files in ``folder``, and return their entries for the manifest. They depend on the rows and
    their order alone. taken: names of files that stay."""
    for left in folder.glob(".*.arrow.*"):  # of a killed run
        remove(left)
    kept, number, entries = set(taken), 0, []
    for part in _parts(rows):
        while (name := f"{number:05d}.arrow") in kept:
            number += 1
        entries.append(_write_shard(folder / name, part))
        kept.add(name)
    return entries


def _parts(rows: Iterable[EncodedRow]) -> Iterator[list[EncodedRow]]:
    part: list[EncodedRow] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row.payload)
        if size >= SHARD_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def as_batch(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """Return rows as one Arrow batch of :data:`SCHEMA`."""
    columns = {
        "id": [row.id for row in rows],
        "content": [row.content for row in rows],
        "check": [row.check for row in rows],
        "about": [json.dumps(row.about) for row in rows],
        "payload": [row.payload for row in rows],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _write_shard(path: Path, rows: Sequence[EncodedRow]) -> dict[str, Any]:
    with writing(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_batch(as_batch(rows))
    return {"name": path.name, "rows": len(rows), "bytes": path.stat().st_size, "sha256": sha256(path)}
