"""Rows of data in files: what belongs to an example, found but not yet read.

A row that is broken shows when it is asked for (BadRow), never when the data is opened; only what is wrong with the
data as a whole (no such column, no metadata) is a ValueError at the start.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localctl.data.bad_rows import BadRow
from localctl.files import first_line
from localctl.labels import brief

MOST_CAPTION = 1_000_000  # bytes
METADATA = "metadata.jsonl"
METADATA_NAMES = (METADATA, "metadata.csv", "metadata.parquet")
# as bytes of the first letters; UTF-32's little-endian mark begins with UTF-16's
_OTHER_ENCODINGS = (
    *(("UTF-32", codecs.BOM_UTF32_LE), ("UTF-32", codecs.BOM_UTF32_BE)),
    *(("UTF-16", codecs.BOM_UTF16_LE), ("UTF-16", codecs.BOM_UTF16_BE)),
)
_OPTIONS = {  # part of a row -> the setting that names its column
    "image": "image_column",
    "condition": "conditioning_image_column",
    "caption": "caption_column",
    "mask": "mask_column",
    "key": "key_column",
}


@dataclass(frozen=True)
class Row:
    """Where the parts of an example are: files, or the bytes of files. captions: at least one, and any will do."""

    image: Path | bytes
    captions: tuple[str, ...]
    condition: Path | bytes | None = None
    mask: Path | bytes | None = None


class Rows:
    """A data set of files. A row is found by its index; BadRow when it cannot be used.

    columns: part of a row (image, condition, mask, caption, key) -> its column, for those parts that are read.
    keys: what each row is called for ever, all different.
    """

    columns: Mapping[str, str]
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Row:
        raise NotImplementedError

    @property
    def has_masks(self) -> bool:
        """Whether masks belong to the data."""
        return "mask" in self.columns

    def remarks(self) -> list[str]:
        """Say what of the data is not used, a clause each; may take as long as looking through all of it."""
        raise NotImplementedError

    def captions(self) -> Iterator[Any] | None:
        """Return every row's caption as it was found; None where each is a file of its own, or there are none."""
        return None


def find_file(what: str, value: Any, folder: Path, roots: Sequence[Path]) -> Path | bytes | None:
    """Find what a cell of a column of images points at: bytes as they are, a path (from ``folder``) as a file that lies
    in one of ``roots``, also after following links. None for an empty cell. BadRow for anything else."""
    if isinstance(value, dict):  # an image of `datasets`
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "\0" in value:
        found = brief(str(value), 80)
        raise BadRow(f"{what} unreadable", f"the {what} is neither a file name nor an image but {found!r}")
    try:
        path = Path(os.path.realpath(folder / value))  # which, unlike Path.resolve, takes links that go in circles
    except (OSError, ValueError) as error:  # half a surrogate pair
        raise BadRow(f"{what} unreadable", f"no file can be called {brief(value)!r} ({first_line(error)})") from None
    if not any(path.is_relative_to(root) for root in roots):
        raise BadRow(f"{what} outside the data", f"the {what} {brief(value)!r} lies outside {roots[0]}")
    return path


def read_caption(file: Path) -> bytes | None:
    """Read the bytes of a caption file, None when there is none. BadRow for one that cannot be read or is no
    caption."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            raise BadRow("caption missing", f"{file.name} is no file")
        with file.open("rb") as opened:
            content = opened.read(MOST_CAPTION + 1)
    except FileNotFoundError:
        return None
    except BadRow:
        raise
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise BadRow("caption unreadable", f"{brief(file.name)} cannot be read ({why})") from None
    if len(content) > MOST_CAPTION:
        raise BadRow("caption too long", f"{file.name} has more than {MOST_CAPTION:,} bytes")
    return content


def unique(keys: Sequence[str]) -> list[str]:
    """Return ``keys`` with #2, #3 ... at second and later occurrences."""
    seen: Counter[str] = Counter()
    result = []
    for key in keys:
        key = key.encode(errors="replace").decode()  # half a surrogate pair has no bytes to be hashed
        seen[key] += 1
        result.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return result


def make_row(
    cell: Callable[[str], Any], folder: Path, roots: Sequence[Path], columns: Mapping[str, str], caption: Any
) -> Row:
    """Make the row whose ``cell`` of a column points at each part, as :func:`find_file` reads it. BadRow where one is
    missing."""
    wanted = [what for what in ("image", "condition", "mask") if what in columns]
    found: dict[str, Any] = {what: find_file(what, cell(columns[what]), folder, roots) for what in wanted}
    for what, value in found.items():
        if value is None:
            others = ", while others have one" if what == "mask" else ""
            raise BadRow(f"{what} missing", f"the row has no {columns[what]}{others}")
    return Row(captions=captions_of(caption) if "caption" in columns else ("",), **found)


def captions_of(caption: Any) -> tuple[str, ...]:
    """Return one caption or a list of them, without the space around. BadRow when there is none, or a blank one."""
    if isinstance(caption, bytes):
        try:
            check_utf8(caption, "the caption")
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRow("caption not UTF-8", f"the caption is not UTF-8 ({error.reason})") from None
        except ValueError as error:
            raise BadRow("caption not UTF-8", first_line(error)) from None
    captions = caption if isinstance(caption, (list, tuple)) else [caption]
    if caption is None or not captions or any(text is None for text in captions):
        raise BadRow("caption missing", "the row has no caption")
    if not all(isinstance(text, str) for text in captions):
        raise BadRow("caption not text", f"the caption is {brief(str(caption), 80)!r}")
    stripped = tuple(text.strip().removeprefix("\ufeff").strip() for text in captions)
    if not all(stripped):
        raise BadRow("caption missing", "the caption is blank")
    if any("\ud800" <= letter <= "\udfff" for text in stripped for letter in text):
        raise BadRow("caption not UTF-8", "the caption holds half a surrogate pair")
    return stripped


def used_columns(columns: Mapping[str, str], seen: Counter[str], place: str) -> dict[str, str]:
    """Return ``columns`` without that of masks if no row has it, as long as it was not asked for by name. ValueError
    naming any other column that no row has."""
    used = {what: name for what, name in columns.items() if seen[name] or (what, name) != ("mask", "mask")}
    for what, option in _OPTIONS.items():
        if what in used and not seen[used[what]]:
            known = ", ".join(sorted(brief(name, 60) for name in seen if seen[name] and name != "file")) or "none"
            raise ValueError(f"No row of {place} has a column {used[what]!r} (data.{option}); there are {known}.")
    return used


def metadata_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, JSON) of each row of ``file``. A row of a .jsonl is passed on as it is, however broken.

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
    """Split lines of JSON. Only these three end one: `splitlines` would also cut at U+2028, which may stand in a
    text."""
    return re.split(rb"\r\n|\n|\r", content)


def check_utf8(content: bytes, name: str) -> None:
    """Raise a ValueError for text in UTF-16 or UTF-32, as some editors and spreadsheets save it."""
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
        raise ValueError(f"{file} is no parquet table ({first_line(error)}).") from None
