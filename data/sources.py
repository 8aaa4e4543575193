"""Samples to convert: tars in the webdataset form, parquet files and hub datasets, in units that can be resumed."""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localctl.data.bad_rows import BadRow
from localctl.files import first_line, parse_json
from localctl.images import EXTENSIONS

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DAMAGED = "tar damaged"
_BATCH = 256  # rows of a parquet file
_MOST_MEMBER = 1 << 30  # bytes of a file in a tar


@dataclass(frozen=True)
class Sample:
    """A sample of a unit. fields: column -> value. problem: why it cannot be read."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    problem: BadRow | None = None


class Unit(ABC):
    """A part of the input whose samples always come in the same order. name: lasting, and unique in the input. size: in
    bytes, or 0; the unit is converted again when it changes. modified: time of the last change, or 0; a damaged unit is
    converted to its end when that changes."""

    name: str
    size: int = 0
    modified: int = 0

    def unchanged(self, record: dict[str, Any]) -> bool:
        """Return whether ``record``, of a finished file, still holds."""
        damaged = any(reason == DAMAGED for _, reason, _ in record["bad"])
        return record["size"] == self.size and not (damaged and record["modified"] != self.modified)

    @abstractmethod
    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the samples from number ``start`` on."""


class Tar(Unit):
    """A tar in the webdataset form: files of one sample follow each other and have one name up to the first dot."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.size, self.modified = path, name, path.stat().st_size, path.stat().st_mtime_ns

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield samples; a damaged tar ends with one that says so."""
        number, name, members = 0, "", {}
        try:
            with tarfile.open(self.path) as tar:
                for member in tar:
                    if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                        continue
                    folder, _, file = member.name.rpartition("/")
                    stem, _, ending = file.partition(".")
                    own = f"{folder}/{stem}" if folder else stem
                    if members and own != name:
                        if number >= start:
                            yield _unpacked(tar, name, members)
                        number, members = number + 1, {}
                    name = own
                    members[ending.lower()] = member
                if members and number >= start:
                    yield _unpacked(tar, name, members)
                _check_end(tar)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            detail = f"the tar is damaged ({first_line(error)}) after {name or 'its beginning'}"
            yield Sample(f"{name or self.name}~", problem=BadRow(DAMAGED, detail))


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise EOFError unless the end mark follows the last member: `tarfile` ends without a word at a damaged header."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise EOFError("it has no end mark where its last file ends")


def _unpacked(tar: tarfile.TarFile, name: str, members: dict[str, tarfile.TarInfo]) -> Sample:
    """Read the files of a sample: ``jpg`` is the column image, ``mask.png`` the column mask, ``txt`` the column text;
    the values of ``json`` are columns, too."""
    fields: dict[str, Any] = {}
    described: Any = {}
    for ending, member in members.items():
        if member.size > _MOST_MEMBER:
            return Sample(name, problem=BadRow("image too large", f"{member.name} has {member.size:,} bytes"))
        opened = tar.extractfile(member)
        content = b"" if opened is None else opened.read()
        if len(content) < member.size:
            raise EOFError("unexpected end of data")
        column, _, extension = ending.rpartition(".")
        if f".{extension}" in EXTENSIONS:
            fields.setdefault(column or "image", {"bytes": content, "path": f"{name}.{extension}"})
        elif ending == "txt":
            fields["text"] = content
        elif ending == "json":
            try:
                described = parse_json(content)
            except ValueError as error:
                return Sample(name, problem=BadRow("metadata damaged", f"its .json is damaged ({first_line(error)})"))
        else:
            fields[ending] = content
    return Sample(name, {**(described if isinstance(described, dict) else {}), **fields})


class Parquet(Unit):
    """A parquet file, such as img2dataset writes."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.size, self.modified = path, name, path.stat().st_size, path.stat().st_mtime_ns

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the rows, named by their number. ValueError if the file is no parquet table."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(_BATCH):
                if number + len(batch) > start:
                    for row in batch.slice(max(0, start - number)).to_pylist():
                        yield Sample("", row)
                number += len(batch)
        except pa.ArrowException as error:
            raise ValueError(f"{self.path} is not a parquet table ({first_line(error)}).") from None


class HubShard(Unit):
    """A shard of a dataset that `datasets` streams. root: the folder of a local one."""

    def __init__(self, table: Any, name: str, root: Path) -> None:
        self._table, self.name, self._root = table, name, root.resolve()

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the rows. OSError if the network fails."""
        try:
            for row in self._table.skip(start) if start else self._table:
                yield self._sample(row)
        except Exception as error:  # network, hub and parsers each raise their own kinds
            raise OSError(f"{self.name} could not be read to its end ({first_line(error)})") from error

    def _sample(self, row: dict[str, Any]) -> Sample:
        try:
            return Sample("", {name: self._with_bytes(value) for name, value in row.items()})
        except BadRow as bad:
            return Sample("", problem=bad)

    def _with_bytes(self, value: Any) -> Any:
        """Return an image of `datasets` with its bytes: that of a file is only its path. BadRow if it is missing, or
        neither on the hub nor in the dataset's folder."""
        if not isinstance(value, dict) or not value.get("path") or value.get("bytes") is not None:
            return value
        import fsspec

        place = value["path"]
        if "://" in place:
            name, allowed = place.rpartition("/")[2], place.rpartition("::")[2].startswith("hf://")
        else:
            path = Path(place).resolve()
            allowed = path.is_relative_to(self._root)
            name = path.relative_to(self._root).as_posix() if allowed else path.name
        if not allowed:
            raise BadRow("image outside the data", f"its image {place} lies neither on the hub nor in {self._root}")
        try:
            with fsspec.open(place, "rb") as file:
                return {"bytes": file.read(), "path": name}
        except FileNotFoundError:
            raise BadRow("image missing", f"there is no file {place}") from None


def find_units(place: str, split: str, config: str | None, revision: str | None) -> list[Unit]:
    """Return the units of a tar, a parquet file, a folder of either, or else of what ``datasets.load_dataset`` reads.
    ValueError if there is nothing."""
    path = Path(place).expanduser()
    if path.is_file():
        files, root = [path], path.parent
    else:
        files, root = sorted(file for file in path.rglob("*") if file.is_file()), path
    for kind, endings in ((Tar, TARS), (Parquet, (".parquet",))):  # img2dataset writes statistics beside its tars
        found = [file for file in files if file.name.lower().endswith(endings) and not file.name.startswith(".")]
        if found:
            return [kind(file, file.relative_to(root).as_posix()) for file in found]
    if path.is_file():
        raise ValueError(f"{path} is neither a tar nor a parquet file; check --input.")
    return _shards(str(path) if path.exists() else place, split, config, revision)


def _shards(place: str, split: str, config: str | None, revision: str | None) -> list[Unit]:
    import datasets

    try:
        table = datasets.load_dataset(place, config, split=split, revision=revision, streaming=True)
        table = table.cast(_undecoded(table.features or table._resolve_features().features))
    except Exception as error:  # as above
        raise ValueError(
            f"{place}, split {split!r}, cannot be opened ({first_line(error)}); give a folder of tars or parquet "
            "files, or a dataset of the hub as USER/NAME."
        ) from error
    count = table.num_shards
    return [
        HubShard(
            table.shard(num_shards=count, index=index), f"{Path(place).name}_{index:05}_of_{count:05}", Path(place)
        )
        for index in range(count)
    ]


def _undecoded(features: Any) -> Any:
    """Return ``features`` with images as bytes, so that a damaged one does not end the stream."""
    import datasets

    return datasets.Features(
        {n: datasets.Image(decode=False) if isinstance(f, datasets.Image) else f for n, f in features.items()}
    )
