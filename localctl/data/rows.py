"""Rows of data in files: what belongs to an example, found but not yet read. One class per format.

A row that is broken shows when it is asked for (BadRow), never when the data is opened; only what is wrong with the
data as a whole (no such column, no metadata) is a ValueError at the start.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from localctl.data.bad import BadRow

METADATA = "metadata.jsonl"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


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

    def captions(self) -> Iterator[Any] | None:
        """Every row's caption as it was found; None where each is a file of its own, or there are none."""
        ...


class ImageFolderRows:
    """Pictures and ``metadata.jsonl`` (also one per subfolder): a line per example with ``file_name``, as wanted
    ``conditioning_image_file_name`` and ``mask_file_name``, relative to the metadata's folder, and the caption.

    ValueError when there is no metadata.jsonl, it is empty, or no line has what ``columns`` asks for.
    """

    def __init__(self, root: Path, columns: Columns) -> None:
        self.root, self.columns = root.resolve(), columns
        self._lines: list[tuple[Path, bytes]] = []
        keys: list[str] = []
        seen: Counter[str] = Counter()
        for file in sorted(self.root.rglob(METADATA)):
            prefix = "" if file.parent == self.root else f"{file.parent.relative_to(self.root).as_posix()}/"
            for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
                if line.strip():
                    values = _parse(line)
                    name = values.get(columns.key or "") or _file_name(values, columns.image)
                    keys.append(f"{prefix}{name}" if name else f"{prefix}{METADATA}:{number}")
                    seen.update(_column(name) for name, value in values.items() if value is not None)
                    self._lines.append((file.parent, line))
        if not self._lines:
            raise ValueError(
                f"There is no {METADATA} with a line per picture in {root}; make one with data/make_dataset.py, or see "
                "docs/data.md."
            )
        seen["image"] += seen["file"]
        check_columns(columns, seen, str(root))
        self.keys: Sequence[str] = unique(keys)
        self.has_masks = columns.mask is not None and seen[columns.mask] > 0

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        folder, line = self._lines[index]
        try:
            values = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise BadRow("caption not UTF-8", f"the line in {METADATA} is not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise BadRow("metadata damaged", f"the line in {METADATA} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise BadRow("metadata damaged", f"the line in {METADATA} is not a JSON object")

        def part(what: str, name: str) -> Path | bytes | None:
            return find_file(what, _file_name(values, name), folder, (self.root,))

        return make_row(part, self.columns, self.has_masks, values.get(self.columns.caption or ""))

    def captions(self) -> Iterator[Any] | None:
        """As in :class:`Rows`, from memory."""
        name = self.columns.caption
        return (_parse(line).get(name) for _, line in self._lines) if name else None


class FolderRows:
    """A folder per example (the innermost ones below ``root``) with a picture, a condition, perhaps a mask, named by
    ``columns`` without extension, and a caption in a text file. ValueError when there is no such folder."""

    def __init__(self, root: Path, columns: Columns) -> None:
        self.root, self.columns = root.resolve(), columns
        folders: list[str] = []
        self.has_masks = False
        for folder, below, files in os.walk(self.root):
            if not below and Path(folder) != self.root:
                folders.append(Path(folder).relative_to(self.root).as_posix())
                self.has_masks |= any(Path(name).stem == columns.mask for name in files)
        if not folders:
            raise ValueError(
                f"There is no folder per example in {root}; data/make_dataset.py makes them, or see docs/data.md."
            )
        self._folders = sorted(folders)
        self.keys: Sequence[str] = unique(self._folders)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Row:
        folder = self.root / self._folders[index]

        def part(what: str, stem: str) -> Path | bytes | None:
            names = (f"{stem}{extension}" for extension in EXTENSIONS)
            found = next((name for name in names if (folder / name).is_file()), None)
            return find_file(what, found, folder, (self.root,))

        return make_row(part, self.columns, self.has_masks, self._caption(folder))

    def captions(self) -> None:
        """As in :class:`Rows`: files."""

    def _caption(self, folder: Path) -> str | None:
        if self.columns.caption is None:
            return None
        file = find_file("caption", f"{self.columns.caption}.txt", folder, (self.root,))
        if not isinstance(file, Path) or not file.is_file():
            return None
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadRow("caption not UTF-8", f"{file.name} is not UTF-8 ({error.reason})") from None


def find_file(what: str, value: Any, folder: Path, roots: Sequence[Path]) -> Path | bytes | None:
    """What a cell of a column of pictures points at: bytes as they are, a path (from ``folder``) as a file that lies in
    one of ``roots``, also after following links. None for an empty cell. BadRow for anything else."""
    if isinstance(value, dict):  # a picture of `datasets`
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "\0" in value:
        raise BadRow(f"{what} unreadable", f"the {what} is neither a file name nor a picture but {str(value)[:80]!r}")
    path = (folder / value).resolve()
    if not any(path.is_relative_to(root) for root in roots):
        raise BadRow(f"{what} outside the data", f"the {what} {value!r} lies outside {roots[0]}")
    return path


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
            caption = caption.decode()
        except UnicodeDecodeError as error:
            raise BadRow("caption not UTF-8", f"the caption is not UTF-8 ({error.reason})") from None
    captions = caption if isinstance(caption, (list, tuple)) else [caption]
    if caption is None or not captions or any(text is None for text in captions):
        raise BadRow("caption missing", "the row has no caption")
    if not all(isinstance(text, str) for text in captions):
        raise BadRow("caption not text", f"the caption is {str(caption)[:80]!r}")
    stripped = tuple(text.strip() for text in captions)
    if not all(stripped):
        raise BadRow("caption missing", "the caption is blank")
    if any("\ud800" <= letter <= "\udfff" for text in stripped for letter in text):
        raise BadRow("caption not UTF-8", "the caption holds half a surrogate pair")
    return stripped


def _parse(line: bytes) -> dict[str, Any]:
    """The values of a line as far as they can be read, for its key and the list of columns."""
    try:
        values = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _file_name(values: dict[str, Any], column: str) -> Any:
    """The cell of a column of pictures: ``<column>_file_name`` as `datasets` has it, ``file_name`` for ``image``, or
    the plain name of the column."""
    names = (f"{column}_file_name", *(("file_name",) if column == "image" else ()), column)
    return next((values[name] for name in names if values.get(name) is not None), None)


def _column(name: str) -> str:
    return "file" if name == "file_name" else name.removesuffix("_file_name")


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
            known = ", ".join(sorted(name for name in seen if seen[name] and name != "file"))
            raise ValueError(f"No row of {place} has a column {name!r} (data.{option}); there are {known}.")
