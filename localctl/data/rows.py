"""Rows of data in files: what belongs to an example, found but not yet read.

A row that is broken shows when it is asked for (BadRow), never when the data is opened; only what is wrong with the
data as a whole (no such column, no metadata) is a ValueError at the start.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from localctl.data.bad_rows import BadRow
from localctl.data.metadata import check_utf8
from localctl.files import first_line
from localctl.labels import brief

MOST_CAPTION = 1_000_000  # bytes


@dataclass(frozen=True)
class Columns:
    """What the parts of an example are called; None = not wanted."""

    image: str
    condition: str | None
    mask: str | None
    caption: str | None
    key: str | None = None


@dataclass(frozen=True)
class Row:
    """Where the parts of an example are: files, or the bytes of files. captions: at least one, and any will do."""

    image: Path | bytes
    condition: Path | bytes | None
    mask: Path | bytes | None
    captions: tuple[str, ...]


class Rows(Protocol):
    """A data set of files. keys: what each row is called for ever, all different. has_masks: whether masks belong to
    it. A row is found by its index; BadRow when it cannot be used."""

    columns: Columns
    keys: Sequence[str]
    has_masks: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def remarks(self) -> list[str]:
        """What of the data is not used, a clause each; may take as long as looking through all of it."""
        ...

    def captions(self) -> Iterator[Any] | None:
        """Every row's caption as it was found; None where each is a file of its own, or there are none."""
        ...


def find_file(what: str, value: Any, folder: Path, roots: Sequence[Path]) -> Path | bytes | None:
    """What a cell of a column of pictures points at: bytes as they are, a path (from ``folder``) as a file that lies in
    one of ``roots``, also after following links. None for an empty cell. BadRow for anything else."""
    if isinstance(value, dict):  # a picture of `datasets`
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "\0" in value:
        found = brief(str(value), 80)
        raise BadRow(f"{what} unreadable", f"the {what} is neither a file name nor a picture but {found!r}")
    try:
        path = Path(os.path.realpath(folder / value))  # which, unlike Path.resolve, takes links that go in circles
    except (OSError, ValueError) as error:  # half a surrogate pair
        raise BadRow(f"{what} unreadable", f"no file can be called {brief(value)!r} ({first_line(error)})") from None
    if not any(path.is_relative_to(root) for root in roots):
        raise BadRow(f"{what} outside the data", f"the {what} {brief(value)!r} lies outside {roots[0]}")
    return path


def read_caption(file: Path) -> bytes | None:
    """The bytes of a caption file, None when there is none. BadRow for one that cannot be read or is no caption."""
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
    """``keys`` with #2, #3 ... at second and later occurrences."""
    seen: Counter[str] = Counter()
    result = []
    for key in keys:
        key = key.encode(errors="replace").decode()  # half a surrogate pair has no bytes to be hashed
        seen[key] += 1
        result.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return result


def make_row(part: Callable[[str, str], Path | bytes | None], columns: Columns, has_masks: bool, caption: Any) -> Row:
    """The row whose parts ``part`` (what, column) finds. BadRow where one is missing."""
    image = part("image", columns.image)
    condition = part("condition", columns.condition) if columns.condition else None
    mask = part("mask", columns.mask) if columns.mask and has_masks else None
    if image is None:
        raise BadRow("image missing", f"the row has no {columns.image}")
    if condition is None and columns.condition:
        raise BadRow("condition missing", f"the row has no {columns.condition}")
    if mask is None and has_masks:
        raise BadRow("mask missing", f"the row has no {columns.mask}, while others have one")
    return Row(image, condition, mask, captions_of(caption) if columns.caption else ("",))


def captions_of(caption: Any) -> tuple[str, ...]:
    """One caption or a list of them, without the space around. BadRow when there is none, or a blank one."""
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


def check_columns(columns: Columns, seen: Counter[str], place: str) -> None:
    """ValueError naming a column that no row has."""
    for option, name in (
        ("image_column", columns.image),
        ("conditioning_image_column", columns.condition),
        ("caption_column", columns.caption),
        ("mask_column", columns.mask if columns.mask != "mask" else None),
        ("key_column", columns.key),
    ):
        if name is not None and not seen[name]:
            known = ", ".join(sorted(brief(name, 60) for name in seen if seen[name] and name != "file")) or "none"
            raise ValueError(f"No row of {place} has a column {name!r} (data.{option}); there are {known}.")
