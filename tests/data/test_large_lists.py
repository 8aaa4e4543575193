"""Lists of many rows: what they hold in memory, and that their compact forms say the same."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, open_files
from localctl.data.keys import unique
from localctl.data.lists import MetadataLines
from localctl.seeding import key_seed, key_seeds


def write_list(root, rows):
    caption = "a street in the rain, with people, umbrellas and the lights of a shop behind them"
    with (root / "metadata.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"file_name": f"images/{number:08}.png", "text": f"{number} {caption}"}) + "\n")
    return (root / "metadata.jsonl").stat().st_size


def growth(root):
    """Return what opening adds to memory, in bytes, and the opened data."""
    data = DataConfig(path=str(root), resolution=64, mask_column=None)
    open_files(data, ConditionConfig(), "train")  # imports, caches
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        source = open_files(data, ConditionConfig(), "train")
        return tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow, source
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rows", [5_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_row_takes_its_line_and_its_name(tmp_path, rows):
    size = write_list(tmp_path, rows)
    added, source = growth(tmp_path)
    assert 0.94 * rows < len(source) < 0.96 * rows
    assert size / rows < added / rows < size / rows * 1.13 + 100  # a row as Python objects takes 400 more
    index = len(source) // 2
    row = int(source.indices[index])
    assert source.key(index) == f"images/{row:08}.png" and source.rows[row].captions[0].startswith(f"{row} a street")


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b", "a", "a", ""], ["\ud800", "?", "ä", "a#2", "a", "a"]])
def test_names_are_made_unique_as_texts_are(names):
    seen, expected = Counter(), []
    for name in (name.encode(errors="replace").decode() for name in names):
        seen[name] += 1
        expected.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    keys = unique(names)
    assert list(keys) == expected and len(keys) == len(names) and keys == expected and keys != [*expected, "x"]
    assert [keys[i] for i in range(len(keys))] == expected and keys[1:3] == expected[1:3]


def test_names_of_many_blocks():
    names = [f"{number % 25_000}" for number in range(30_001)]
    keys = unique(names)
    assert keys[9_999:10_002] == ["9999", "10000", "10001"] and keys[30_000] == "5000#2" and keys[-1] == "5000#2"
    with pytest.raises(IndexError):
        keys[30_001]


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40])
def test_seeds_of_many_samples_are_those_of_each(seed):
    samples = ["", "a", "images/ä\u2028.png", "x" * 1000]
    assert list(key_seeds(seed, "a purpose", samples)) == [key_seed(seed, "a purpose", name) for name in samples]


def test_lines_come_back_with_their_folder(tmp_path):
    lines = MetadataLines()
    expected = [(tmp_path / folder, line) for folder in "ab" for line in (b"{}", b"", b"\xff")]
    for folder, line in expected:
        lines.append(folder, line)
    assert list(lines) == expected and len(lines) == 6 and lines[np.int64(3)] == expected[3]
