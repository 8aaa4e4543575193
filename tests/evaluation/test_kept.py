"""Tables that are measured once, and again when anything they depend on has changed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from localctl.evaluation import kept
from localctl.evaluation.kept import kept_tables, sha256_of_files


def test_once_for_the_same_and_again_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"base": [{"leak": math.nan, "f1": 0.1 + 0.2}, {"leak": 0.0, "f1": 1.0}]}

    first = kept_tables(tmp_path, {"seed": 0}, make)
    again = kept_tables(tmp_path, {"seed": 0}, make)
    assert len(made) == 1 and again["base"][0]["f1"] == first["base"][0]["f1"]
    assert (
        list(again["base"][0]) == ["leak", "f1"]
        and math.isnan(again["base"][0]["leak"])
        and again["base"][1] == first["base"][1]
    )
    kept_tables(tmp_path, {"seed": 1}, make)
    assert len(made) == 2
    monkeypatch.setattr(kept, "sha256_of_code", lambda: "other code")
    kept_tables(tmp_path, {"seed": 0}, make)
    monkeypatch.setattr(kept, "versions", lambda: {"torch": "0"})
    kept_tables(tmp_path, {"seed": 0}, make)
    assert len(made) == 4 == len(list(tmp_path.iterdir()))
    path = next(iter(tmp_path.iterdir()))
    assert json.loads(path.read_text())["described"]["depends_on"]["seed"] in (0, 1)


def test_files_count_by_name_and_content(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    hashes = set()
    for contents in (("x", "yz"), ("xy", "z"), ("x", "yy")):
        for path, content in zip(paths, contents, strict=True):
            path.write_text(content)
        hashes.add(sha256_of_files(paths, tmp_path))
    assert len(hashes) == 3 and sha256_of_files(paths, tmp_path) in hashes
