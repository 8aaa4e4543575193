"""Rows of parquet files and of data sets of the hub, through `datasets`; pictures stay undecoded until our own gate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from localctl.data.bad import BadRow
from localctl.data.config import DataConfig
from localctl.data.rows import Columns, Row, check_columns, find_file, make_row, unique

_AT_ONCE = 10_000  # cells of a column


class TableRows:
    """A `datasets.Dataset`. ``roots``: folders in which pictures may lie that the table only names, the first being
    where relative names start. ValueError when a column is missing."""

    def __init__(self, table: Any, columns: Columns, roots: Sequence[Path], place: str) -> None:
        from datasets import Image, List

        check_columns(columns, Counter(table.column_names), place)
        self.columns = columns
        self.has_masks = columns.mask in table.column_names
        self._roots = tuple(root.resolve() for root in roots)
        mask = columns.mask if self.has_masks else None
        wanted = [name for name in (columns.image, columns.condition, mask, columns.caption) if name is not None]
        self.keys: Sequence[str] = _keys(table, columns, self._roots)
        for name in (columns.image, columns.condition, mask):
            feature = table.features.get(name) if name else None
            if isinstance(feature, Image):
                table = table.cast_column(name, Image(decode=False))
            elif isinstance(feature, List):
                raise ValueError(f"The column {name!r} of {place} holds lists of pictures; one per row is needed.")
        self._table = table.select_columns(list(dict.fromkeys(wanted)))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Row:
        try:
            values = self._table[index]
        except UnicodeDecodeError as error:
            raise BadRow("caption not UTF-8", f"the caption is not UTF-8 ({error.reason})") from None
        except (OSError, ValueError) as error:
            raise BadRow("row unreadable", f"the row cannot be read ({error})") from None
        columns = self.columns

        def part(what: str, name: str) -> Path | bytes | None:
            return find_file(what, values[name], self._roots[0], self._roots)

        return make_row(part, columns, self.has_masks, values[columns.caption] if columns.caption else None)

    def captions(self) -> Iterator[Any] | None:
        """As in :class:`Rows`, from the Arrow table."""
        return None if self.columns.caption is None else self._cells(self.columns.caption)

    def _cells(self, name: str) -> Iterator[Any]:
        """A column; None for a cell that cannot be read."""
        column = self._table.select_columns([name])
        for first in range(0, len(self), _AT_ONCE):
            last = min(first + _AT_ONCE, len(self))
            try:
                yield from column[first:last][name]
            except (OSError, ValueError):  # of one of them
                yield from (_cell(column, name, index) for index in range(first, last))


def _cell(column: Any, name: str, index: int) -> Any:
    try:
        return column[index][name]
    except (OSError, ValueError):
        return None


def open_table(data: DataConfig, split: str, columns: Columns) -> TableRows:
    """``data.path`` (a parquet file or a folder of them) or the hub's data set ``data.name``. ValueError when it cannot
    be loaded, in one sentence."""
    import datasets  # slow to import, and of no use to the embedded scenes

    options: dict[str, Any] = {"split": split, "cache_dir": data.cache_dir}
    if data.name == "parquet":
        assert data.path is not None
        place = Path(data.path).expanduser()
        files = [place] if place.is_file() else _parquet_files(place, split)
        table_name, options["data_files"] = "parquet", {split: [str(file) for file in files]}
        roots = [place.parent if place.is_file() else place]
    else:
        table_name, place = data.name, Path(data.name).expanduser()
        options |= {"name": data.dataset_config_name, "revision": data.revision}
        cache = Path(data.cache_dir) if data.cache_dir else Path(datasets.config.HF_CACHE_HOME)
        roots = [place, cache] if place.is_dir() else [cache, Path(datasets.config.HF_DATASETS_CACHE)]
    try:
        table = datasets.load_dataset(table_name, **options)
    except Exception as error:  # the network, the hub, builders and parsers: whatever goes wrong is the data's
        why = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise ValueError(f"The data {data.path or data.name!r}, split {split!r}, cannot be loaded: {why}") from error
    return TableRows(table, columns, roots, data.path or data.name)


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """All in ``folder``; of a split where files or subfolders are named after it, as on the hub (train-00000-of-9)."""
    files = sorted(folder.rglob("*.parquet"))
    named = [f for f in files if split in f.relative_to(folder).parts[:-1] or f.stem.split("-")[0] == split]
    if not files:
        raise ValueError(f"There is no *.parquet file in {folder}; check data.path.")
    if not named and split != "train":
        raise ValueError(f"No *.parquet file in {folder} belongs to the split {split!r}.")
    return named or files


def _keys(table: Any, columns: Columns, roots: Sequence[Path]) -> list[str]:
    """The key column, or the names of the pictures where there are any, or the row numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if columns.key is not None:
        return unique([str(value) for value in table.data.column(columns.key).to_pylist()])
    column = table.data.column(columns.image)
    if pa.types.is_struct(column.type) and "path" in [field.name for field in column.type]:
        column = pc.struct_field(column, "path")
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    names = [str(name or "") for name in column.to_pylist()] if text else [""]
    if not all(names):
        return [f"row {number}" for number in range(len(table))]
    return unique([_lasting(Path(name), roots[0]) for name in names])


def _lasting(path: Path, root: Path) -> str:
    """A name that stays when the data is moved, or downloaded again in another revision."""
    if "snapshots" in path.parts:  # of the hub's cache: snapshots/REVISION/...
        return "/".join(path.parts[path.parts.index("snapshots") + 2 :])
    if path.is_absolute():
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return path.as_posix()
