"""Rows on disk: read by id, checked, the same bytes for the same rows."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from localctl.encodings import store as module
from localctl.encodings.codec import pack, unpack
from localctl.encodings.store import DamagedRow, EncodedRow, Manifest, Store, hashed, write_shards

RECIPE = {"kind": "images", "size": [8, 8]}


def row(number: int, payload: bytes = b"") -> EncodedRow:
    about, content = {"n": number}, hashed("file", str(number))
    return EncodedRow(hashed(str(number)), content, about, payload or bytes([number]) * 1000)


def stored(folder: Path, *rows: EncodedRow) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    Manifest(RECIPE, write_shards(folder, rows)).write(folder)
    return Store(folder)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 3000)


def flip_bit(path: Path, content: bytes) -> None:
    """Flip a bit in the middle of ``content``, wherever it lies in the file."""
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)


def test_rows_are_found_by_id_in_any_order(tmp_path, small_shards):
    store = stored(tmp_path, *map(row, range(10)))
    assert [shard["rows"] for shard in store.manifest.shards] == [3, 3, 3, 1]
    for number in (7, 0, 9, 3):
        found = store.get(hashed(str(number)))
        assert found is not None and found.about == {"n": number} and bytes(found.payload) == row(number).payload
    ids = [hashed(str(number)) for number in (3, 99, 0)]
    assert store.has(ids).tolist() == [True, False, True] and store.get(ids[1]) is None
    assert store.contents(ids) == [hashed("file", "3"), None, hashed("file", "0")]
    assert len(store) == 10 and len(set(store.ids)) == 10


def test_of_two_rows_with_an_id_the_later_counts(tmp_path, small_shards):
    again = row(1, b"new" * 400)
    assert bytes(stored(tmp_path, row(0), row(1), row(2), again).get(again.id).payload) == again.payload


def test_the_files_depend_on_the_rows_alone(tmp_path, small_shards):
    entries = [stored(tmp_path / name, *map(row, range(7))).manifest.shards for name in "ab"]
    assert entries[0] == entries[1] and len({shard["sha256"] for shard in entries[0]}) == 3


def test_a_flipped_bit_is_found_by_reading_and_by_checking(tmp_path, small_shards):
    store = stored(tmp_path, *map(row, range(6)))
    flip_bit(tmp_path / "00001.arrow", row(4).payload)
    store = Store(tmp_path)
    assert bytes(store.get(hashed("3")).payload) == row(3).payload
    with pytest.raises(DamagedRow, match=r"00001\.arrow have changed"):
        store.get(hashed("4"))
    assert store.damaged() == ["00001.arrow"]


@pytest.mark.parametrize(("change", "said"), [("cut", "has 100 bytes, not"), ("gone", "is missing")])
def test_a_file_cut_off_or_gone_is_named_when_opened(tmp_path, change, said):
    stored(tmp_path, *map(row, range(3)))
    path = tmp_path / "00000.arrow"
    path.write_bytes(path.read_bytes()[:100]) if change == "cut" else path.unlink()
    with pytest.raises(ValueError, match=rf"{path} of encodings {said}.*localctl cache"):
        Store(tmp_path)


@pytest.mark.parametrize(("content", "said"), [("{", "not valid JSON"), ('{"version": 0}', "of version 0, not 1")])
def test_a_manifest_of_another_kind_is_refused(tmp_path, content, said):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"{said}.*delete the folder and cache again"):
        Store(tmp_path)


def test_forked_workers_read_on_their_own(tmp_path, small_shards):
    store = stored(tmp_path, *map(row, range(6)))
    assert store.get(hashed("0")) is not None  # files are open
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(Lookup(store), range(6))
    assert found == [row(number).payload for number in range(6)]


class Lookup:
    """What a data worker does."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, number: int) -> bytes:
        found = self.store.get(hashed(str(number)))
        assert found is not None
        return bytes(found.payload)


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_survive_bit_for_bit(dtype, squeeze):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 4).to(dtype), "none": None, "edges": torch.randint(256, (1, 5, 5)) / 255}
    about, payload = pack(tensors, squeeze)
    found = unpack(about, payload)
    assert found["none"] is None
    for name in ("a", "edges"):
        assert found[name].dtype == tensors[name].dtype and torch.equal(found[name], tensors[name])


def test_conditions_take_a_byte_per_value_before_compression():
    edges = (torch.arange(64 * 64).reshape(1, 64, 64) % 256) / 255
    assert len(pack({"edges": edges}, squeeze=True)[1]) < edges.numel()
