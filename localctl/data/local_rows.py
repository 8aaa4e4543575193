"""Datasets in folders, one class per format."""

from __future__ import annotations

import os
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from localctl.data.bad_rows import BadRow
from localctl.data.folders import Walk, canonical, count_words, is_hidden, is_image, select, split_named, split_of
from localctl.data.keys import text_column, unique
from localctl.data.lists import MetadataLines, Sides, metadata_lines
from localctl.data.rows import METADATA, METADATA_NAMES, Row, Rows, find_file, make_row, read_caption, used_columns
from localctl.files import first_line, parse_json
from localctl.images import EXTENSIONS


class ImageFolderRows(Rows):
    """Images and a ``metadata.jsonl`` (or .csv, .parquet; also one per subfolder) with a row per example.

    A row has ``file_name``, relative to the metadata file's folder, the caption and, where ``columns`` asks for them,
    ``conditioning_image_file_name`` and ``mask_file_name``. The metadata files below a folder named after ``split``
    belong to the split; if there is no such folder, the rows whose image lies in one.

    Raises:
        ValueError: no metadata file, an empty one, no row in the split, or a column that no row has.
    """

    def __init__(self, root: Path, columns: Mapping[str, str], split: str) -> None:
        self.root, self.split = root.resolve(), split
        lists = self._lists()
        self.root, lists, others = own_folder(self.root, lists, split)
        self._lines, sides = MetadataLines(), Sides()
        self._named = array("q")  # hashes of the paths of images in all lines, which take less memory than the paths
        splits: list[str | None] = []
        kinds: Counter[tuple[str, ...]] = Counter()
        names = text_column(self._read(lists, columns, sides, splits if others is None else None, kinds))
        if not self._lines:
            raise ValueError(f"{', '.join(map(str, lists[:3]))} is empty; it needs a line per image.")
        self._rows: np.ndarray | None = None  # the lines of the split; None = all
        if others is None:
            chosen, others = select(splits, split, str(root))
            self._rows = np.array(chosen)
            names = names.take(self._rows)
        self.keys = unique(names)
        self._sides = sides.table()
        self.other_splits = others
        seen: Counter[str] = Counter()
        for kind, count in kinds.items():
            seen.update({name: count for name in map(_column, kind)})
        seen["image"] += seen["file"]
        self.columns = used_columns(columns, seen, str(root))

    def _read(
        self,
        lists: Sequence[Path],
        columns: Mapping[str, str],
        sides: Sides,
        splits: list[str | None] | None,
        kinds: Counter[tuple[str, ...]],
    ) -> Iterator[str]:
        """Read all lines of the metadata files ``lists``, and yield the key of each.

        Appends the size of each image to ``sides`` and its split to ``splits``, and counts the sets of columns in
        ``kinds``.
        """
        split_of_folder = lru_cache(maxsize=4096)(lambda folders: split_of(folders.split("/"), self.split))
        for file in lists:
            parts = file.parent.relative_to(self.root).parts
            prefix = "".join(f"{part}/" for part in parts)
            folder = file.parent
            for number, line in metadata_lines(file):
                values = _parse(line)
                name = _file_name(values, columns["image"])
                key = values.get(columns.get("key", "")) or name
                if splits is not None:
                    place = f"{prefix}{name}" if isinstance(name, str) else prefix
                    splits.append(split_of_folder(place.rpartition("/")[0]))
                kinds[tuple(name for name, value in values.items() if value is not None)] += 1
                sides.append(values)
                self._lines.append(folder, line)
                self._named.extend(
                    hash(os.path.normpath(os.path.join(folder, value)))
                    for value in values.values()
                    if isinstance(value, str) and is_image(value)
                )
                yield f"{prefix}{key}" if key else f"{prefix}{file.name}:{number}"

    def _line(self, index: int) -> tuple[Path, bytes]:
        """Return the folder of the metadata file, and the line, of row ``index``."""
        return self._lines[index if self._rows is None else int(self._rows[index])]

    def sizes(self) -> np.ndarray | None:
        """Return the (height, width) of all images, if the metadata states them."""
        return self._sides if self._sides is None or self._rows is None else self._sides[self._rows]

    def _lists(self) -> list[Path]:
        """Find all metadata files. ValueError when there is none, or two in one folder."""
        found, images = [], 0
        for folder, below, files in Walk(self.root):
            here = [name for name in (*below, *files) if name.lower() in METADATA_NAMES]
            if len(here) > 1:
                raise ValueError(f"{folder} has both {' and '.join(here)}; remove one of them.")
            found += [folder / name for name in here]
            images += sum(map(is_image, files))
        if not found:
            raise ValueError(
                f"There is no {METADATA} with a line per image in {self.root}, but {images} images; make a dataset of "
                f"them: python data/make_dataset.py --images {self.root} --output DATASET (docs/data.md)."
            )
        return sorted(found)

    def __getitem__(self, index: int) -> Row:
        folder, line = self._line(index)
        try:
            values = parse_json(line)
        except UnicodeDecodeError as error:
            raise BadRow("caption not UTF-8", f"the line in {METADATA} is not UTF-8 ({error.reason})") from None
        except ValueError as error:
            raise BadRow("metadata damaged", f"the line in {METADATA} is not JSON ({first_line(error)})") from None
        if not isinstance(values, dict):
            raise BadRow("metadata damaged", f"the line in {METADATA} is not a JSON object")
        caption = values.get(self.columns.get("caption", ""))
        return make_row(partial(_file_name, values), folder, (self.root,), self.columns, caption)

    def captions(self) -> Iterator[Any] | None:
        """Yield the captions of the metadata, from memory."""
        name = self.columns.get("caption")
        return (_parse(self._line(index)[1]).get(name) for index in range(len(self))) if name else None

    def remarks(self) -> list[str]:
        """Return clauses on files that are not used. Walks through the whole folder."""
        named = set(self._named)
        walk = Walk(self.root, count=True)
        without = 0
        for folder, _, files in walk:
            if self.other_splits:
                own = split_of(folder.relative_to(self.root).parts, self.split)
                if own not in (None, canonical(self.split)):
                    continue
            without += sum(is_image(name) and hash(os.path.join(folder, name)) not in named for name in files)
        lines = [f"{without} images in {self.root} have no line in {METADATA} and are not used"] if without else []
        return [*lines, *left_out(walk, self.other_splits)]


class FolderRows(Rows):
    """A folder per example with an image, a condition, an optional mask, and a caption in a text file.

    ``columns`` names these files without extension. Every folder below ``root`` that holds such an image, or no other
    folder, is an example. ``split`` selects the examples below a folder of this name. ValueError when there are none.
    """

    def __init__(self, root: Path, columns: Mapping[str, str], split: str) -> None:
        self.root, self.loose = root.resolve(), 0
        with_masks = False
        found: list[Path] = []
        walk = Walk(self.root)
        for folder, below, files in walk:
            if folder == self.root:
                self.loose = sum(map(is_image, files))
                continue
            stems = [os.path.splitext(name)[0].lower() for name in files if is_image(name)]
            if columns["image"].lower() in stems:
                below.clear()  # these folders belong to the example
            if not below:
                found.append(folder)
                with_masks |= columns.get("mask", "").lower() in stems
        found = sorted([*found, *(folder for folder in walk.locked if folder != self.root)])
        self.root, found, others = own_folder(self.root, found, split)
        names = [folder.relative_to(self.root) for folder in found]
        if not names:
            raise ValueError(
                f"There are no folders of examples in {root}; make them with data/make_dataset.py, or see docs/data.md."
            )
        if others is None:
            chosen, others = select([split_of(name.parts[:-1], split) for name in names], split, str(root))
            names = [names[index] for index in chosen]
        self.other_splits = others
        self.columns = {what: name for what, name in columns.items() if what != "mask" or with_masks}
        self._folders = [name.as_posix() for name in names]
        self.keys = unique(self._folders)

    def __getitem__(self, index: int) -> Row:
        folder = self.root / self._folders[index]
        try:
            names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
        except OSError as error:
            raise BadRow("folder unreadable", f"the folder cannot be read ({error.strerror})") from None
        caption = self._caption(folder, names)
        return make_row(partial(_called, names, EXTENSIONS), folder, (self.root,), self.columns, caption)

    def _caption(self, folder: Path, names: Sequence[str]) -> bytes | None:
        if "caption" not in self.columns:
            return None
        file = find_file("caption", _called(names, (".txt",), self.columns["caption"]), folder, (self.root,))
        return read_caption(file) if isinstance(file, Path) else None

    def remarks(self) -> list[str]:
        """Return clauses on files that are not used. Walks through the whole folder."""
        walk = Walk(self.root, count=True)
        deque(walk, maxlen=0)
        walk.left_out["locked folder"] = 0  # reported as a bad row
        lines = [f"{self.loose} images lie in {self.root} itself, not in a folder per example"] if self.loose else []
        return [*lines, *left_out(walk, self.other_splits)]


def own_folder(root: Path, places: Sequence[Path], split: str) -> tuple[Path, list[Path], Counter[str] | None]:
    """Find the folder directly below ``root`` that is named after ``split`` and holds some of ``places``.

    Returns:
        The folder, the places in it, and the number of folders beside it by split; if there is no such folder, or
        several: ``root``, all places, and None.
    """
    parts = [place.relative_to(root).parts for place in places]
    named = sorted({first for first, *rest in parts if rest and split_of((first,), split) == canonical(split)})
    if len(named) != 1:
        return root, list(places), None
    outside = sum(first != named[0] and split_named(first) is None for first, *_ in parts)
    beside: list[str | None] = []
    with suppress(OSError):
        beside = [split_named(e.name) for e in os.scandir(root) if e.is_dir() and not is_hidden(e.name)]
    others = Counter(name for name in beside if name not in (None, canonical(split)))
    own = root / named[0]
    inside = [place for place in places if place.is_relative_to(own)]
    return own, inside, others + Counter({"no split at all": outside})


def left_out(walk: Walk, splits: Counter[str]) -> list[str]:
    """Return clauses on what a finished ``walk`` skipped, and on other ``splits``."""
    lines = [f"left out in {walk.root}: {words}"] if (words := count_words(walk.left_out)) else []
    if splits:
        lines.append(f"not used here, other splits: {', '.join(sorted(splits))} (data.split, data.validation_split)")
    return lines


def _called(names: Sequence[str], extensions: Sequence[str], stem: str) -> str | None:
    """Return the name that is ``stem`` with one of ``extensions`` (the first that exists), in any case."""
    low = {name.lower(): name for name in reversed(names)}
    return next((low[name] for end in extensions if (name := f"{stem.lower()}{end}") in low), None)


def _parse(line: bytes) -> dict[str, Any]:
    """Read a line of metadata for its key and columns; empty if damaged, which is reported when the row is read."""
    try:
        values = parse_json(line.decode(errors="replace"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _file_name(values: dict[str, Any], column: str) -> Any:
    """Return the cell of a column of images: ``<column>_file_name`` as in `datasets`, ``file_name`` for ``image``, or
    the plain name of the column; None if the row has none of them."""
    for name in _names_of(column):
        if (value := values.get(name)) is not None:
            return value
    return None


@lru_cache(maxsize=64)
def _names_of(column: str) -> tuple[str, ...]:
    return (f"{column}_file_name", *(("file_name",) if column == "image" else ()), column)


def _column(name: str) -> str:
    return "file" if name == "file_name" else name.removesuffix("_file_name")
