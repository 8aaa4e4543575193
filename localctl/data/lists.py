"""Metadata files: lists with a line per image, as JSON lines, CSV or parquet, read line by line and kept as bytes."""

from __future__ import annotations

import codecs
import csv
import json
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from localctl.data.rows import check_utf8, split_lines
from localctl.files import first_line

SIDES = ("height", "width")  # columns that state the size of an image
_AT_ONCE = 10_000  # rows of a table


class MetadataLines:
    """Lines of JSON in one block of memory, each with the folder of its file. ``lines[i]`` returns (folder, line)."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._folders: list[Path] = []
        self._folder_of, self._ends = array("l"), array("q", [0])

    def __len__(self) -> int:
        return len(self._folder_of)

    def __iter__(self) -> Iterator[tuple[Path, bytes]]:
        return (self[index] for index in range(len(self)))

    def append(self, folder: Path, line: bytes) -> None:
        """Add a line of the metadata file in ``folder``."""
        if not self._folders or self._folders[-1] is not folder:
            self._folders.append(folder)
        self._folder_of.append(len(self._folders) - 1)
        self._content += line
        self._ends.append(len(self._content))

    def __getitem__(self, index: int) -> tuple[Path, bytes]:
        line = self._content[self._ends[index] : self._ends[index + 1]]
        return self._folders[self._folder_of[index]], bytes(line)


def metadata_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, JSON) of each row of a metadata file. Rows of .jsonl files are not parsed here.

    ValueError when the file as a whole cannot be read: a folder or pipe, another encoding, a damaged table.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is not a regular file; it must be a list with a line per image.")
        if file.suffix.lower() == ".parquet":
            yield from enumerate(_parquet_rows(file), start=1)
            return
        with file.open("rb") as opened:
            check_utf8(opened.read(4), str(file))
            opened.seek(0)
            if file.suffix.lower() == ".csv":
                yield from enumerate(_csv_rows(file, opened.readline()), start=1)
                return
            for number, line in enumerate(_lines(opened), start=1):
                line = line.removeprefix(codecs.BOM_UTF8)  # at the beginning, and in concatenated files
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}).") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, at the usual three line ends."""
    for part in file:  # ends with \n
        if b"\r" not in part:
            yield part.removesuffix(b"\n")
            continue
        lines = split_lines(part)
        yield from lines if lines[-1] else lines[:-1]


def _csv_rows(file: Path, header: bytes) -> Iterator[bytes]:
    delimiter = max(",;\t", key=header.decode(errors="replace").count)  # many European locales use semicolons
    before = csv.field_size_limit(2**31 - 1)  # captions may be longer than the default limit
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            for row in csv.DictReader(text, delimiter=delimiter):
                values = {name.strip(): value for name, value in row.items() if isinstance(name, str) and value}
                yield json.dumps(values).encode()
    except csv.Error as error:
        raise ValueError(f"{file} is not a CSV table ({error}); save it again as CSV.") from None
    finally:
        csv.field_size_limit(before)


def _parquet_rows(file: Path) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(_AT_ONCE):
            for row in batch.to_pylist():
                yield json.dumps(row, default=str).encode()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a parquet table ({first_line(error)}); save it again.") from None


class Sides:
    """Heights and widths that rows state in columns ``height`` and ``width``, as long as all of them do."""

    def __init__(self) -> None:
        self._sides: array[int] | None = array("i")

    def append(self, values: dict[str, Any]) -> None:
        """Add those of a row."""
        height, width = (values.get(name) for name in SIDES)
        if self._sides is None:
            return
        if isinstance(height, int) and isinstance(width, int) and 0 < min(height, width) <= max(height, width) < 2**31:
            self._sides.extend((height, width))
        else:
            self._sides = None

    def table(self) -> np.ndarray | None:
        """Return (n,2) int32; None if a row lacked one."""
        return None if self._sides is None else np.array(self._sides, np.int32).reshape(-1, 2)
