"""Rows of datasets in files: the files of each example are located, but not read yet.

A broken row raises BadRow when it is read, never when the dataset is opened. Only a problem of the dataset as a whole
(a missing column, no metadata) is a ValueError on opening.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from localctl.data.bad_rows import BadRow
from localctl.files import first_line
from localctl.labels import shorten

MOST_CAPTION = 1_000_000  # bytes
METADATA = "metadata.jsonl"
METADATA_NAMES = (METADATA, "metadata.csv", "metadata.parquet")
# Byte order marks. UTF-32 comes first, as its little-endian mark begins with that of UTF-16.
_OTHER_ENCODINGS = (
    *(("UTF-32", codecs.BOM_UTF32_LE), ("UTF-32", codecs.BOM_UTF32_BE)),
    *(("UTF-16", codecs.BOM_UTF16_LE), ("UTF-16", codecs.BOM_UTF16_BE)),
)
_OPTIONS = {  # part of a row -> setting that names its column
    "image": "image_column",
    "condition": "conditioning_image_column",
    "caption": "caption_column",
    "mask": "mask_column",
    "key": "key_column",
}


@dataclass(frozen=True)
class Row:
    """The parts of an example as files, or as the bytes of files. captions: one or more alternatives."""

    image: Path | bytes
    captions: tuple[str, ...]
    condition: Path | bytes | None = None
    mask: Path | bytes | None = None


class Rows:
    """A dataset of files. ``rows[i]`` returns a :class:`Row`; BadRow when it cannot be used.

    columns: part of a row (image, condition, mask, caption, key) -> its column, for the parts that are read.
    keys: the permanent name of each row, all different.
    """

    columns: Mapping[str, str]
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Row:
        raise NotImplementedError

    @cached_property
    def places(self) -> np.ndarray:
        """Where each key lies between 0 and 1, for the choice of held-out examples."""
        from localctl.data.held_out import places_of  # loads torch, which programs that make datasets do not need

        return places_of(self.keys)

    @property
    def has_masks(self) -> bool:
        """Whether the dataset has masks."""
        return "mask" in self.columns

    def image(self, index: int) -> Path | bytes | BinaryIO:
        """Return the image of row ``index``, for its header; BadRow as for ``rows[index]``."""
        return self[index].image

    def sizes(self) -> np.ndarray | None:
        """Return the (height, width) of all images, (n,2) int32, if columns of these names state them."""
        return None

    def remarks(self) -> list[str]:
        """Return clauses on data that is not used; may walk through the whole dataset."""
        raise NotImplementedError

    def captions(self) -> Iterator[Any] | None:
        """Return the raw caption of every row; None if captions are separate files, or there are none."""
        return None


def find_file(what: str, value: Any, folder: Path, roots: Sequence[Path]) -> Path | bytes | None:
    """Resolve a cell of a column of images.

    Args:
        what: the part of the row, for error messages.
        value: a path from ``folder``, the bytes of an image, an image of `datasets`, or None.
        roots: folders; the file must lie in one of them after all links are resolved.

    Returns:
        The file or the bytes; None for an empty cell.

    Raises:
        BadRow: the cell is anything else, or points outside ``roots``.
    """
    if isinstance(value, dict):  # an image of `datasets`
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "\0" in value:
        found = shorten(str(value), 80)
        raise BadRow(f"{what} unreadable", f"the {what} is neither a file name nor an image but {found!r}")
    try:
        path = Path(os.path.realpath(folder / value))  # unlike Path.resolve, it accepts circular links
    except (OSError, ValueError) as error:  # half a surrogate pair
        raise BadRow(f"{what} unreadable", f"no file can be called {shorten(value)!r} ({first_line(error)})") from None
    if not any(path.is_relative_to(root) for root in roots):
        raise BadRow(f"{what} outside the data", f"the {what} {shorten(value)!r} lies outside {roots[0]}")
    return path


def read_caption(file: Path) -> bytes | None:
    """Read the bytes of a caption file; None if it does not exist. BadRow if it cannot be read, is too long or is no
    regular file."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would block
            raise BadRow("caption missing", f"{file.name} is not a regular file")
        with file.open("rb") as opened:
            content = opened.read(MOST_CAPTION + 1)
    except FileNotFoundError:
        return None
    except BadRow:
        raise
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise BadRow("caption unreadable", f"{shorten(file.name)} cannot be read ({why})") from None
    if len(content) > MOST_CAPTION:
        raise BadRow("caption too long", f"{file.name} has more than {MOST_CAPTION:,} bytes")
    return content


def make_row(
    cell: Callable[[str], Any], folder: Path, roots: Sequence[Path], columns: Mapping[str, str], caption: Any
) -> Row:
    """Make a row; ``cell`` returns the cell of a column, see :func:`find_file`. BadRow when a part is missing."""
    wanted = [what for what in ("image", "condition", "mask") if what in columns]
    found: dict[str, Any] = {what: find_file(what, cell(columns[what]), folder, roots) for what in wanted}
    for what, value in found.items():
        if value is None:
            others = ", while others have one" if what == "mask" else ""
            raise BadRow(f"{what} missing", f"the row has no {columns[what]}{others}")
    return Row(captions=captions_of(caption) if "caption" in columns else ("",), **found)


def captions_of(caption: Any) -> tuple[str, ...]:
    """Return one or several captions, stripped. BadRow when one is missing, blank, or no valid text."""
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
        raise BadRow("caption not text", f"the caption is {shorten(str(caption), 80)!r}")
    stripped = tuple(text.strip().removeprefix("\ufeff").strip() for text in captions)
    if not all(stripped):
        raise BadRow("caption missing", "the caption is blank")
    if any("\ud800" <= letter <= "\udfff" for text in stripped for letter in text):
        raise BadRow("caption not UTF-8", "the caption holds half a surrogate pair")
    return stripped


def used_columns(columns: Mapping[str, str], seen: Counter[str], place: str) -> dict[str, str]:
    """Return the ``columns`` to read. A column "mask", the default, may be missing from all rows and is then left out.

    seen: column -> number of rows that have it. ValueError naming any other column that no row has.
    """
    used = {what: name for what, name in columns.items() if seen[name] or (what, name) != ("mask", "mask")}
    for what, option in _OPTIONS.items():
        if what in used and not seen[used[what]]:
            known = ", ".join(sorted(shorten(name, 60) for name in seen if seen[name] and name != "file")) or "none"
            raise ValueError(f"No row of {place} has a column {used[what]!r} (data.{option}); the columns are {known}.")
    return used


def split_lines(content: bytes) -> list[bytes]:
    """Split lines of JSON at the usual three line ends. `splitlines` would also split at U+2028, which is allowed in
    JSON texts."""
    return re.split(rb"\r\n|\n|\r", content)


def check_utf8(content: bytes, name: str) -> None:
    """Raise a ValueError for text in UTF-16 or UTF-32, which some editors and spreadsheets save."""
    encoding = next((name for name, mark in _OTHER_ENCODINGS if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:4]:
        encoding = "UTF-16"  # without a mark; every other byte of ASCII is 0
    if encoding is not None:
        raise ValueError(f"{name} is {encoding}; save it as UTF-8.")
