"""The results of an ablation as they lie in its folder, one JSON per training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localctl.evaluation.provenance import REQUIRED, check_provenance, read_json
from research.reader import reader_version

CONDITIONS = "conditions.png"


@dataclass(frozen=True)
class Result:
    """A measured cell. samples (n, k) over columns, NaN = undefined; ceiling (n, k): of the base's result only.
    distances: by name. failed: why there is nothing."""

    name: str
    row: str
    title: str
    seed: int
    ids: tuple[str, ...]
    columns: tuple[str, ...]
    samples: np.ndarray
    ceiling: np.ndarray | None
    distances: Mapping[str, float]
    training: Mapping[str, Any]
    provenance: Mapping[str, Any]
    failed: str = ""


def read_results(folder: Path) -> dict[str, Result]:
    """The results in ``folder``, by name. ValueError for a damaged one, or protocols that differ."""
    results: dict[str, Result] = {}
    protocols: set[str] = set()
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, "result")
        missing = [key for key in ("asked", "name", "row", "title", "seed", "provenance") if key not in content]
        if missing:
            raise ValueError(f"{path} is no result of the ablation (no {missing[0]}); remove it.")
        results[content["name"]] = _result(content)
        asked = content["asked"]
        protocols.add(repr((sorted(asked.get("protocol", {}).items()), reader_version(asked))))
    if len(protocols) > 1:
        raise ValueError(f"The results in {folder} were measured in different ways; measure them again, in one.")
    return results


def _result(content: Mapping[str, Any]) -> Result:
    if not content.get("failed"):
        check_provenance(content["name"], content, REQUIRED)
    ceiling = content.get("ceiling")
    return Result(
        name=content["name"],
        row=content["row"],
        title=content["title"],
        seed=content["seed"],
        ids=tuple(content.get("ids", ())),
        columns=tuple(content.get("columns", ())),
        samples=_array(content.get("samples", [])),
        ceiling=None if ceiling is None else _array(ceiling),
        distances=content.get("distances", {}),
        training={**content.get("training", {}), "asked": content["asked"]},
        provenance=content["provenance"],
        failed=content.get("failed", ""),
    )


def _array(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)
