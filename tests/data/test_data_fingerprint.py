"""Another dataset under the same names has another fingerprint; the same dataset elsewhere has not."""

import os
import shutil
from pathlib import Path

import datasets
import pytest
from file_data import picture, read_metadata, to_folders, to_parquet, write_imagefolder, write_metadata

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, open_files
from localctl.data.fingerprint import LOOKED_AT, sample

COLUMN = ConditionConfig(kind="column")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_imagefolder(tmp_path / "data")


def prints(path: Path, name: str = "imagefolder", condition: ConditionConfig = COLUMN, **data) -> dict:
    options = {"resolution": 32, "validation_share": 0} | data
    return open_files(DataConfig(name=name, path=str(path), **options), condition, "train").fingerprints


def changed(before: dict, now: dict) -> set[str]:
    assert list(before) == list(now)
    return {name for name in now if before[name] != now[name]}


def other_captions(root: Path) -> None:
    write_metadata(root, [line | {"text": line["text"].upper()} for line in read_metadata(root)])


def other_files(root: Path, kind: str) -> None:
    for i in range(6):
        picture(i + 7).save(root / kind / f"{i:03}.png")


def one_byte(root: Path) -> None:
    file = root / "masks" / "003.png"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def reordered(root: Path) -> None:
    write_metadata(root, read_metadata(root)[::-1])


CASES = {
    "captions": (other_captions, {"captions"}),
    "one of several captions": (lambda root: one_more_caption(root), {"captions"}),
    "images": (lambda root: other_files(root, "images"), {"images"}),
    "condition images": (lambda root: other_files(root, "conditions"), {"condition images"}),
    "masks": (lambda root: other_files(root, "masks"), {"masks"}),
    "one byte of one mask": (one_byte, {"masks"}),
    "an image gone": (lambda root: (root / "images" / "002.png").unlink(), {"images"}),
}


def one_more_caption(root: Path) -> None:
    lines = read_metadata(root)
    lines[4]["text"] = [lines[4]["text"], "another"]
    write_metadata(root, lines)


@pytest.mark.parametrize("case", CASES)
def test_what_changed_is_named(folder, case):
    before = prints(folder)
    change, expected = CASES[case]
    change(folder)
    assert changed(before, prints(folder)) == expected


def test_rows_that_come_go_or_change_places(folder):
    before = prints(folder)
    reordered(folder)
    assert "names of the examples" in changed(before, prints(folder))
    write_metadata(folder, read_metadata(folder)[:-1])
    assert {"number of examples", "names of the examples"} <= changed(before, prints(folder))


def test_the_same_content_elsewhere_is_the_same(folder, tmp_path):
    before = prints(folder)
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, moved)
    for file in moved.rglob("*.png"):
        os.utime(file, (1, 1))
    lines = [{"extra": 1} | dict(reversed(line.items())) for line in read_metadata(moved)]
    write_metadata(moved, lines)  # another column, another order of the values
    assert prints(moved) == before
    assert prints(to_parquet(moved, tmp_path / "tables" / "all.parquet"), "parquet") == before
    assert prints(folder) == before


def test_a_table_without_names(folder, tmp_path):
    """Rows without names, as on the hub, have the keys "row 0" and so on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(name: str, shift: int = 0, suffix: str = "") -> Path:
        write_imagefolder(tmp_path / name)
        other_files(tmp_path / name, "images") if shift else None
        rows = pq.read_table(to_parquet(tmp_path / name, tmp_path / f"{name}.parquet")).to_pydict()
        rows["image"] = [{"bytes": cell["bytes"], "path": None} for cell in rows["image"]]
        rows["text"] = [text + suffix for text in rows["text"]]
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    before = prints(table("first"), "parquet")
    assert changed(before, prints(table("same"), "parquet")) == set()
    assert changed(before, prints(table("images", shift=7), "parquet")) == {"images"}
    assert changed(before, prints(table("captions", suffix="!"), "parquet")) == {"captions"}


def test_folders_of_examples(folder, tmp_path):
    root = to_folders(folder, tmp_path / "folders")
    depth = ConditionConfig(kind="depth")
    before = prints(root, "folder", depth)
    (root / "002" / "caption.txt").write_text("another")
    assert changed(before, prints(root, "folder", depth)) == {"captions"}


def test_masks_and_conditions_that_come_and_go(folder):
    with_masks = prints(folder)
    assert changed(with_masks, prints(folder, condition=ConditionConfig(kind="canny"))) == {"condition images"}
    write_metadata(folder, [{k: v for k, v in line.items() if k[:4] != "mask"} for line in read_metadata(folder)])
    assert changed(with_masks, prints(folder)) == {"masks"}


def test_what_cannot_be_read_does_not_stop_it(folder):
    file = folder / "images" / "000.png"
    file.unlink()
    os.mkfifo(file)  # would never end
    lines = read_metadata(folder)
    lines[1]["file_name"] = "images/" + "x" * 300 + ".png"
    lines[2]["text"] = None
    write_metadata(folder, lines)
    with (folder / "metadata.jsonl").open("ab") as metadata:
        metadata.write(b'{"file_name": "images/003.png", "text": "\xff"}\nno json\n')
    assert prints(folder) == prints(folder)


def test_the_sample_is_spread_over_all_rows_and_always_the_same():
    assert list(sample(5)) == [0, 1, 2, 3, 4] and list(sample(0)) == []
    many = list(sample(100_003))
    assert len(many) == len(set(many)) == LOOKED_AT and many == sorted(many) == list(sample(100_003))
    parts = [place * LOOKED_AT // 100_003 for place in many]
    assert parts == list(range(LOOKED_AT)) and many[-1] < 100_003
