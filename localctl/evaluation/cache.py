"""Measured tables kept in files, each under the hash of all that it depends on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import localctl
from localctl.evaluation.provenance import read_json, versions, write_json
from localctl.files import sha256_of_json

Rows = list[dict[str, float]]


class Kept:
    """Tables of figures in ``folder``. What they depend on beside what :meth:`tables` is told, the libraries and the
    code of this package, is looked up here, so make this when the program starts: code may change while it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        root = Path(localctl.__file__).parent
        self.always = {"versions": versions(), "code_sha256": sha256_of_files(sorted(root.rglob("*.py")), root)}

    def tables(self, depends_on: Mapping[str, Any], make: Callable[[], dict[str, Rows]]) -> dict[str, Rows]:
        """Return what ``make`` returns: rows of figures by name, NaN = undefined. Made once for the same ``depends_on``
        (plain values), and read from the folder ever after. ValueError for a damaged file."""
        described = {"depends_on": dict(depends_on), **self.always}
        name = sha256_of_json(described)
        path = self.folder / f"{name}.json"
        if not path.is_file():
            made = make()
            write_json(path, {"described": described, "tables": {name: _plain(rows) for name, rows in made.items()}})
            return made
        kept = read_json(path, "kept measurement")
        try:
            return {
                name: [dict(zip(table["columns"], map(_number, row), strict=True)) for row in table["rows"]]
                for name, table in kept["tables"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"The kept measurement {path} is damaged; remove it to measure again.") from None


def _plain(rows: Rows) -> dict[str, Any]:
    """With the order of the columns, which JSON objects do not keep here, and NaN as null."""
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "rows": [[None if math.isnan(row[c]) else row[c] for c in columns] for row in rows]}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def sha256_of_files(paths: Sequence[Path], root: Path) -> str:
    """Hash the names below ``root`` and the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}:{len(content)}:".encode() + content)
    return digest.hexdigest()
