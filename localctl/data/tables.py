"""Rows of parquet files and hub datasets, read by `datasets`; their images are decoded later, as those of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from localctl.data.bad_rows import BadRow
from localctl.data.config import DataConfig
from localctl.data.folders import Walk, count_words, select, split_of
from localctl.data.keys import Keys, unique
from localctl.data.lists import SIDES
from localctl.data.rows import Row, Rows, make_row, used_columns
from localctl.files import first_line
from localctl.labels import shorten

_AT_ONCE = 10_000  # cells of a column that are read at once
_NOT_LASTING = r"^/|\\|(^|/)snapshots/|//|(^|/)\./|/$|^\.$"  # names that _lasting changes, or may change


class TableRows(Rows):
    """The rows of a `datasets.Dataset`.

    roots: folders in which images named by the table may lie; relative names start from the first. ValueError when a
    column is missing, or holds lists of images.
    """

    def __init__(
        self, table: Any, columns: Mapping[str, str], roots: Sequence[Path], place: str, remarks: Sequence[str] = ()
    ) -> None:
        from datasets import Image, List

        self._remarks = list(remarks)
        self.columns = used_columns(columns, Counter(table.column_names), place)
        self._roots = tuple(root.resolve() for root in roots)
        self.keys = _keys(table, columns, self._roots)
        for name in (self.columns.get(what, "") for what in ("image", "condition", "mask")):
            feature = table.features.get(name)
            if isinstance(feature, Image):
                table = table.cast_column(name, Image(decode=False))
            elif isinstance(feature, List):
                raise ValueError(f"The column {name!r} of {place} holds lists of images; give one image per row.")
        self._sizes = _sizes(table)
        read = dict.fromkeys(name for what, name in self.columns.items() if what != "key")
        self._table = table.select_columns(list(read))

    def __getitem__(self, index: int) -> Row:
        try:
            values = self._table[index]
        except UnicodeDecodeError as error:
            raise BadRow("caption not UTF-8", f"the caption is not UTF-8 ({error.reason})") from None
        except Exception as error:  # parsers of tables raise nearly anything on damaged bytes
            raise BadRow("row unreadable", f"the row cannot be read ({first_line(error)})") from None
        caption = values.get(self.columns.get("caption"))
        return make_row(values.__getitem__, self._roots[0], self._roots, self.columns, caption)

    def image(self, index: int) -> Path | bytes | BinaryIO:
        """Return the image of row ``index`` for its header; the bytes of the table are not copied."""
        import pyarrow as pa

        cell = self._table.data.column(self.columns["image"])[index]
        if isinstance(cell, pa.StructScalar) and "bytes" in cell:
            cell = cell["bytes"]
        kinds = (pa.BinaryScalar, pa.LargeBinaryScalar)
        return pa.BufferReader(cell.as_buffer()) if isinstance(cell, kinds) and cell.is_valid else self[index].image

    def sizes(self) -> np.ndarray | None:
        """Return the (height, width) of all images, if columns of these names state them."""
        return self._sizes

    def remarks(self) -> list[str]:
        """Return clauses on data that is not used."""
        return self._remarks

    def captions(self) -> Iterator[Any] | None:
        """Return the column of captions."""
        return self._cells(self.columns["caption"]) if "caption" in self.columns else None

    def _cells(self, name: str) -> Iterator[Any]:
        """Yield the cells of a column; None for a cell that cannot be read."""
        column = self._table.select_columns([name])
        for first in range(0, len(self), _AT_ONCE):
            last = min(first + _AT_ONCE, len(self))
            try:
                yield from column[first:last][name]
            except (OSError, ValueError):  # one of the cells is damaged
                yield from (_cell(column, name, index) for index in range(first, last))


def _sizes(table: Any) -> np.ndarray | None:
    """Return the columns ``height`` and ``width`` as (n,2) int32; None unless both hold positive integers in all
    rows."""
    import pyarrow as pa

    if not {*SIDES} <= set(table.column_names):
        return None
    columns = [table.data.column(name) for name in SIDES]
    if not all(pa.types.is_integer(column.type) and not column.null_count for column in columns):
        return None
    sides = np.stack([column.to_numpy() for column in columns], axis=1)
    return sides.astype(np.int32) if (sides > 0).all() else None


def _cell(column: Any, name: str, index: int) -> Any:
    try:
        return column[index][name]
    except (OSError, ValueError):
        return None


def open_table(data: DataConfig, split: str, columns: Mapping[str, str]) -> TableRows:
    """Open ``data.path`` (a parquet file or a folder of them) or the hub dataset ``data.name``. ValueError when it
    cannot be loaded."""
    import datasets  # slow to import, and not needed for other formats

    options: dict[str, Any] = {"split": split, "cache_dir": data.cache_dir}
    remarks: list[str] = []
    if data.name == "parquet":
        assert data.path is not None
        place = Path(data.path).expanduser()
        files, remarks = ([place], []) if place.is_file() else _parquet_files(place, split)
        table_name, options["data_files"] = "parquet", {split: [str(file) for file in files]}
        if common := _common_columns(files, columns):
            options["columns"] = common
        roots = [place.parent if place.is_file() else place]
    else:
        table_name, place = data.name, Path(data.name).expanduser()
        options |= {"name": data.dataset_config_name, "revision": data.revision}
        cache = Path(data.cache_dir) if data.cache_dir else Path(datasets.config.HF_CACHE_HOME)
        roots = [place, cache] if place.is_dir() else [cache, Path(datasets.config.HF_DATASETS_CACHE)]
    try:
        table = datasets.load_dataset(table_name, **options)
    except Exception as error:  # network, hub and parsers each raise their own kinds
        raise _not_loaded(data.path or data.name, split, error) from error
    return TableRows(table, columns, roots, data.path or data.name, remarks)


def _not_loaded(place: str, split: str, error: BaseException) -> ValueError:
    """Make the error for data that cannot be loaded, from the root cause: builders wrap it in "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return ValueError(
        f"The data {place!r}, split {split!r}, cannot be loaded: {shorten(str(error) or repr(error), 300)}"
    )


def _common_columns(files: Sequence[Path], columns: Mapping[str, str]) -> list[str] | None:
    """Return the columns to read from parquet files, None = all. ValueError naming a file that lacks a column of the
    others."""
    import pyarrow.parquet as pq

    wanted = set(columns.values())
    names: list[set[str]] = []
    for file in files:
        try:
            names.append(set(pq.read_schema(file).names))
        except Exception as error:  # as above
            raise _not_loaded(str(file), "of this file", error) from error
    for file, own in zip(files, names, strict=True):
        lacking = sorted(name for name in (set.union(*names) - own) & wanted)
        if lacking:
            other = next(f for f, has in zip(files, names, strict=True) if lacking[0] in has)
            raise ValueError(
                f"{file} has no column {', '.join(map(repr, lacking))}, but {other.name} has; give all files the same "
                f"columns (it has {', '.join(sorted(own))})."
            )
    same = all(own == names[0] for own in names)
    return None if same else sorted(set.intersection(*names) & {*wanted, *SIDES})


def _parquet_files(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """Find the parquet files of ``split`` in ``folder``; return them and remarks on the other files.

    The names of subfolders decide; if none of them denotes a split, the names of the files
    (train-00000-of-00009.parquet).
    """
    walk = Walk(folder)
    files = [path / name for path, _, names in walk for name in names if name.lower().endswith(".parquet")]
    if not files:
        raise ValueError(f"There is no *.parquet file in {folder}; check data.path.")
    parts = [file.relative_to(folder).parts for file in files]
    splits = [split_of(names[:-1], split) for names in parts]
    if not any(splits):
        splits = [split_of((file.stem.split("-")[0], file.name), split) for file in files]
    chosen, others = select(splits, split, str(folder))
    return [files[index] for index in chosen], (
        [f"not used here, other parquet files: {count_words(others)} (data.split, data.validation_split)"]
        if others
        else []
    )


def _keys(table: Any, columns: Mapping[str, str], roots: Sequence[Path]) -> Keys:
    """Return the key column; without one the names of the images, or row numbers if images have no names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if "key" in columns:
        column = table.data.column(columns["key"])
        return unique(column if _is_text(column.type) and not column.null_count else map(str, _values(column)))
    column = table.data.column(columns["image"])
    if pa.types.is_struct(column.type) and "path" in [field.name for field in column.type]:
        column = pc.struct_field(column, "path")
    if not _is_text(column.type) or column.null_count or pc.any(pc.equal(column, "")).as_py():
        return unique(f"row {number}" for number in range(len(table)))
    if pc.any(pc.match_substring_regex(column, _NOT_LASTING)).as_py():
        return unique(_lasting(Path(name), roots[0]) for name in _values(column))
    return unique(column)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _values(column: Any) -> Iterator[Any]:
    """Yield the values of a column of Arrow."""
    return (value for chunk in column.chunks for value in chunk.to_pylist())


def _lasting(path: Path, root: Path) -> str:
    """Return a name that does not change when the data is moved, or downloaded in another revision."""
    if "snapshots" in path.parts:  # in the hub's cache: snapshots/REVISION/...
        return "/".join(path.parts[path.parts.index("snapshots") + 2 :])
    if path.is_absolute():
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return path.as_posix()
