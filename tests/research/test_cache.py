"""Cached tables: measured once, and again when anything they depend on has changed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from localctl.evaluation.provenance import read_json, write_json
from research import cache as module
from research.cache import TableCache, sha256_of_files


def test_once_for_the_same_and_again_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"base": [{"leak": math.nan, "f1": 0.1 + 0.2}, {"leak": 0.0, "f1": 1.0}]}

    cache = TableCache(tmp_path)
    first, again = cache.tables({"seed": 0}, make), cache.tables({"seed": 0}, make)
    assert len(made) == 1 and again["base"][0]["f1"] == first["base"][0]["f1"]
    assert list(again["base"][0]) == ["leak", "f1"] and math.isnan(again["base"][0]["leak"])
    assert again["base"][1] == first["base"][1]
    cache.tables({"seed": 1}, make)
    assert len(made) == 2
    monkeypatch.setattr(module, "versions", lambda: {"torch": "0"})
    cache.tables({"seed": 0}, make)  # versions are those of the constructor's time
    assert len(made) == 2
    other = TableCache(tmp_path)
    other.tables({"seed": 0}, make)
    other.always["code_sha256"] = "another"
    other.tables({"seed": 0}, make)
    assert len(made) == 4 == len(list(tmp_path.iterdir())) and len(cache.always["code_sha256"]) == 64
    path = next(iter(tmp_path.iterdir()))
    assert json.loads(path.read_text())["described"]["depends_on"]["seed"] in (0, 1)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"tables": [1]}', '{"tables": {"base": {"columns": 3}}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    cache = TableCache(tmp_path)
    cache.tables({"seed": 0}, lambda: {"base": [{"f1": 1.0}]})
    path = next(tmp_path.iterdir())
    path.write_text(text)
    with pytest.raises(ValueError, match=f"cached measurement {path} (is damaged|is not valid JSON|holds)"):
        cache.tables({"seed": 0}, lambda: {})


def test_half_a_letter_can_be_written_and_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x" / "a.json", {"caption": "caf\u00e9 \ud83d"})
    assert read_json(tmp_path / "x" / "a.json", "record") == {"caption": "caf\u00e9 \ud83d"}
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"b\.json could not be written: No space left"):
        write_json(tmp_path / "x" / "b.json", {})
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.json"]


def test_files_count_by_name_and_content(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    hashes = set()
    for contents in (("x", "yz"), ("xy", "z"), ("x", "yy")):
        for path, content in zip(paths, contents, strict=True):
            path.write_text(content)
        hashes.add(sha256_of_files(paths, tmp_path))
    assert len(hashes) == 3 and sha256_of_files(paths, tmp_path) in hashes
