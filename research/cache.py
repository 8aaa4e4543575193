"""Cache measured tables in files, each named by the hash of everything that it depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import localctl
from localctl.evaluation.provenance import read_json, versions, write_json
from localctl.files import sha256_of_files, sha256_of_json

Rows = list[dict[str, float]]


class TableCache:
    """A cache of tables in ``folder``.

    The versions of the libraries and the hash of this package's code belong to every key. The constructor reads them:
    create the cache when the program starts, because code may change while it runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        root = Path(localctl.__file__).parent
        self.always = {"versions": versions(), "code_sha256": sha256_of_files(sorted(root.rglob("*.py")), root)}

    def tables(self, depends_on: Mapping[str, Any], make: Callable[[], dict[str, Rows]]) -> dict[str, Rows]:
        """Return the tables that ``make`` measures, and measure them only once per ``depends_on``.

        Args:
            depends_on: everything that the values depend on besides code and libraries, as plain JSON values.
            make: returns rows of values by table name, NaN = undefined.

        Raises:
            ValueError: the cached file is damaged.
        """
        described = {"depends_on": dict(depends_on), **self.always}
        name = sha256_of_json(described)
        path = self.folder / f"{name}.json"
        if not path.is_file():
            measured = make()
            plain = {name: _plain(rows) for name, rows in measured.items()}
            write_json(path, {"described": described, "tables": plain})
            return measured
        cached = read_json(path, "cached measurement")
        try:
            return {
                name: [dict(zip(table["columns"], map(_number, row), strict=True)) for row in table["rows"]]
                for name, table in cached["tables"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"The cached measurement {path} is damaged; remove it to measure again.") from None


def _plain(rows: Rows) -> dict[str, Any]:
    """Convert rows to plain JSON: columns in order (keys of JSON objects are sorted here), NaN as null."""
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "rows": [[None if math.isnan(row[c]) else row[c] for c in columns] for row in rows]}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
