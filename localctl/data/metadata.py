"""The list of an imagefolder: metadata.jsonl, .csv or .parquet, each row as one line of JSON."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

METADATA = "metadata.jsonl"
METADATA_NAMES = (METADATA, "metadata.csv", "metadata.parquet")
# as bytes of the first letters; UTF-32's little-endian mark begins with UTF-16's
_OTHER_ENCODINGS = (
    *(("UTF-32", codecs.BOM_UTF32_LE), ("UTF-32", codecs.BOM_UTF32_BE)),
    *(("UTF-16", codecs.BOM_UTF16_LE), ("UTF-16", codecs.BOM_UTF16_BE)),
)


def metadata_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, JSON) of each row of ``file``. A row of a .jsonl is passed on as it is, however broken.

    ValueError when the file as a whole cannot be read: a folder or pipe, another encoding, no such table.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is no file; a list with a line per image is needed there.")
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}).") from None
    if file.suffix.lower() == ".parquet":
        yield from enumerate(_parquet_rows(file), start=1)
        return
    check_utf8(content, str(file))
    content = content.removeprefix(codecs.BOM_UTF8)
    if file.suffix.lower() == ".csv":
        yield from enumerate(_csv_rows(content.decode(errors="surrogateescape"), file), start=1)
        return
    for number, line in enumerate(split_lines(content), start=1):
        line = line.removeprefix(codecs.BOM_UTF8)  # of files that were joined
        if line.strip():
            yield number, line


def split_lines(content: bytes) -> list[bytes]:
    """Lines of JSON. Only these three end one: `splitlines` would also cut at U+2028, which may stand in a text."""
    return re.split(rb"\r\n|\n|\r", content)


def check_utf8(content: bytes, name: str) -> None:
    """ValueError for text in UTF-16 or UTF-32, as some editors and spreadsheets save it."""
    encoding = next((name for name, mark in _OTHER_ENCODINGS if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:4]:
        encoding = "UTF-16"  # without a mark: every other byte of plain letters is 0
    if encoding is not None:
        raise ValueError(f"{name} is {encoding}; save it as UTF-8.")


def _csv_rows(text: str, file: Path) -> Iterator[bytes]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # spreadsheets of half of Europe write semicolons
    before = csv.field_size_limit(2**31 - 1)  # a long caption is no reason to give up
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
            values = {name.strip(): value for name, value in row.items() if isinstance(name, str) and value}
            yield json.dumps(values).encode()
    except csv.Error as error:
        raise ValueError(f"{file} is no table of comma-separated values ({error}).") from None
    finally:
        csv.field_size_limit(before)


def _parquet_rows(file: Path) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for row in pq.read_table(file).to_pylist():
            yield json.dumps(row, default=str).encode()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no parquet table ({str(error).partition(chr(10))[0]}).") from None
