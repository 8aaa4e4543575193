"""Folders as users have them: splits by name, hidden folders, images in no list, lists of other formats."""

import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import SPLIT_KEYWORDS, get_data_patterns
from file_data import picture, png, read_metadata, to_folders, to_parquet, write_imagefolder, write_metadata

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, open_files
from localctl.data.folders import SPLIT_WORDS, Walk, count_words, split_named
from localctl.data.held_out import held_out, places_of
from localctl.data.lists import metadata_lines

COLUMN = ConditionConfig(kind="column", channels=1)


@pytest.fixture(autouse=True)
def quiet_and_own_cache(monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def opened(path, name="imagefolder", part="train", condition=COLUMN, **options):
    options = {"resolution": 32, "validation_share": 0, **options}
    return open_files(DataConfig(name=name, path=str(path), **options), condition, part)


def keys(source):
    return [source.key(i) for i in range(len(source))]


def test_the_words_are_those_of_datasets():
    assert {name: set(words) for name, words in SPLIT_WORDS.items()} == {
        str(split): set(words) for split, words in SPLIT_KEYWORDS.items()
    }


@pytest.mark.parametrize(
    "name",
    ["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation", "val2017"]
    + ["train_images", "my-test-set", "split.dev", "trainer", "latest", "develop", "contest", "images", "evaluate"]
    + ["10 test", "test1", "1train", "retrain", "valley"],
)
def test_a_folder_is_a_split_where_datasets_says_so(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.png").write_bytes(b"")
    named = split_named(name)
    assert {str(split) for split in get_data_patterns(str(tmp_path))} == {named or "train"}
    assert split_named(name.upper()) == split_named(name.title()) == named


@pytest.mark.parametrize("name", ["imagefolder", "folder", "parquet"])
@pytest.mark.parametrize(
    "folders", [("train", "val"), ("Training", "Validation"), ("TRAIN", "valid"), ("train2017", "dev")]
)
def test_splits_by_folders_of_any_usual_name(tmp_path, name, folders):
    for number, folder in enumerate(folders):
        made = write_imagefolder(tmp_path / "made" / folder, 3 - number)
        if name == "folder":
            to_folders(made, tmp_path / "data" / folder, "depth")
        elif name == "parquet":
            to_parquet(made, tmp_path / "data" / folder / "part.parquet")
    root = tmp_path / ("made" if name == "imagefolder" else "data")
    condition = ConditionConfig(kind="depth") if name == "folder" else COLUMN
    options = {"validation_split": "val", "condition": condition}
    train, val = (opened(root, name, part, **options) for part in ("train", "val"))
    assert (len(train), len(val)) == (3, 2)
    assert train[0].caption == val[0].caption == "picture 0"
    assert len(opened(root, name, split="validation", condition=condition)) == 2
    assert any("validation" in remark or "val" in remark for remark in train.rows.remarks())
    with pytest.raises(ValueError, match=f"Nothing in {root} belongs to the split 'test'.*data.split"):
        opened(root, name, split="test", condition=condition)


@pytest.mark.parametrize("name", ["imagefolder", "folder"])
def test_what_lies_beside_the_folder_of_the_split_is_said(tmp_path, name):
    made = [write_imagefolder(tmp_path / "made" / place, 2) for place in ("train", "more")]
    if name == "folder":
        made = [to_folders(root, tmp_path / "data" / root.name, "depth") for root in made]
    root = made[0].parent
    source = opened(root, name, condition=ConditionConfig(kind="depth") if name == "folder" else COLUMN)
    assert len(source) == 2 and any("no split at all" in remark for remark in source.rows.remarks())


@pytest.mark.parametrize("alone", ["val", "Testing", "eval"])
def test_a_split_alone_is_not_taken_for_another(tmp_path, alone):
    write_imagefolder(tmp_path / alone, 3)
    with pytest.raises(ValueError, match="belongs to the split 'train' .there are: 3 "):
        opened(tmp_path)
    assert len(opened(tmp_path, split=alone.lower())) == 3
    assert len(opened(tmp_path / alone)) == 3  # named as the data itself, it is no split


def test_rows_of_one_list_belong_where_their_files_lie(tmp_path):
    write_imagefolder(tmp_path, 6)
    lines = read_metadata(tmp_path)
    for number, line in enumerate(lines):
        place = f"images/{('train', 'val', 'Test')[number % 3]}/{number}.png"
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / line["file_name"]).rename(tmp_path / place)
        line["file_name"] = place
    write_metadata(tmp_path, lines)
    assert [opened(tmp_path, split=split)[0].caption[-1] for split in ("train", "dev", "test")] == ["0", "1", "2"]
    source = opened(tmp_path, validation_split="valid")
    assert len(source) == 2 and source.rows.remarks() == [
        "not used here, other splits: test, validation (data.split, data.validation_split)"
    ]


@pytest.mark.parametrize(
    "names",
    [("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"), ("TRAIN_a", "my train", "dev-0")]
    + [("a", "b", "validation")],
)
def test_parquet_files_belong_to_the_split_they_are_named_after(tmp_path, names):
    for name in names:
        to_parquet(write_imagefolder(tmp_path / "made", 2), tmp_path / "data" / f"{name}.parquet")
    to_parquet(tmp_path / "made", tmp_path / "data" / ".hidden-train.parquet")
    source = opened(tmp_path / "data", "parquet")
    assert len(source) == 4 and source.rows.remarks() and "other parquet files: 1" in source.rows.remarks()[0]
    assert len(opened(tmp_path / "data" / f"{names[-1]}.parquet", "parquet")) == 2  # named itself: whatever its name


@pytest.mark.parametrize(
    "hidden",
    [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".trash", "#recycle", "$RECYCLE.BIN", "System Volume Information"],
)
def test_hidden_folders_and_files_are_no_examples(tmp_path, hidden):
    root = write_imagefolder(tmp_path / "data", 3)
    write_imagefolder(root / hidden, 2)
    write_imagefolder(root / "images" / hidden, 2)
    picture(0).save(root / "images" / "._000.png")
    source = opened(root)
    assert keys(source) == [f"images/{i:03}.png" for i in range(3)]
    assert any("hidden image" in remark for remark in source.rows.remarks())
    folders = to_folders(write_imagefolder(tmp_path / "other", 3), tmp_path / "folders")
    for place in (folders / "001" / hidden, folders / hidden / "x"):
        place.mkdir(parents=True)
        picture(7).save(place / "original.jpg")
    assert keys(opened(folders, "folder", condition=ConditionConfig(kind="depth"))) == ["000", "001", "002"]


def test_an_examples_folder_may_use_any_case_and_extension_and_hold_more(tmp_path):
    folders = to_folders(write_imagefolder(tmp_path / "made", 4), tmp_path / "folders")
    (folders / "000" / "original.jpg").rename(folders / "000" / "Original.JPG")
    (folders / "001" / "caption.txt").rename(folders / "001" / "CAPTION.TXT")
    picture(2).save(folders / "002" / "original.tif")
    (folders / "002" / "original.jpg").unlink()
    (folders / "003" / "drafts").mkdir()
    picture(9).save(folders / "003" / "drafts" / "old.png")
    (folders / "003" / "caption.txt").rename(folders / "003" / "text")
    (folders / "003" / "caption.txt").mkdir()  # a folder named like a file
    picture(9).save(folders / "loose.jpg")
    source = opened(folders, "folder", condition=ConditionConfig(kind="depth"))
    assert keys(source) == ["000", "001", "002", "003"]
    assert [source[i].caption for i in range(3)] == ["picture 0", "picture 1", "picture 2"]
    with pytest.raises(ValueError, match="no caption|is not a regular file"):
        source[3]
    assert "1 images lie in" in source.rows.remarks()[0]


def test_images_without_a_line_are_counted(tmp_path):
    root = write_imagefolder(tmp_path / "data", 8)
    write_metadata(root, [{**line, "file_name": "./" + line["file_name"]} for line in read_metadata(root)[:3]])
    for name in ("IMG_1.HEIC", "IMG_2.heic", "raw.NEF", "notes.txt", "Thumbs.db"):
        (root / name).write_bytes(b"x")
    os.symlink(root / "images", root / "again")
    first, second = opened(root).rows.remarks()
    assert first.startswith("15 images in ") and "no line in metadata.jsonl" in first  # 5 of each of three folders
    assert "2 .heic" in second and "1 .nef" in second and "1 linked folder" in second and "db" not in second


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    root = write_imagefolder(tmp_path / "data", 3)
    folders = to_folders(root, tmp_path / "folders")
    scan, listed = os.scandir, os.listdir

    def locked(original):
        def guarded(path="."):
            if not isinstance(path, int) and Path(path).name in ("masks", "001"):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        return guarded

    monkeypatch.setattr(os, "scandir", locked(scan))
    monkeypatch.setattr(os, "listdir", locked(listed))
    assert "1 locked folder" in opened(root).rows.remarks()[0]
    source = opened(folders, "folder", condition=ConditionConfig(kind="depth"))
    assert keys(source) == ["000", "001", "002"] and source[2].caption == "picture 2"
    with pytest.raises(ValueError, match="Permission denied"):
        source[1]


def rows_as_csv(lines, delimiter=",", newline="\n"):
    names = list(lines[0])
    cells = [names, *([str(line[name]) for name in names] for line in lines)]
    return newline.join(delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in row) for row in cells)


@pytest.mark.parametrize("kind", ["plain", "bom", "crlf", "semicolons", "parquet"])
def test_lists_may_be_tables(tmp_path, kind):
    root = write_imagefolder(tmp_path / "data", 3)
    lines = read_metadata(root)
    lines[1]["text"] = "a red, round \u2028 thing; NA"
    (root / "metadata.jsonl").unlink()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), root / "metadata.parquet")
    else:
        text = rows_as_csv(lines, ";" if kind == "semicolons" else ",", "\r\n" if kind == "crlf" else "\n")
        (root / "metadata.csv").write_bytes((b"\xef\xbb\xbf" if kind == "bom" else b"") + text.encode())
    source = opened(root)
    assert keys(source) == [f"images/{i:03}.png" for i in range(3)] and source.rows.has_masks
    assert [source[i].caption for i in range(3)] == ["picture 0", "a red, round \u2028 thing; NA", "picture 2"]
    if kind in ("plain", "parquet"):
        table = datasets.load_dataset("imagefolder", data_dir=str(root), split="train")
        assert [row["text"] for row in table] == [source[i].caption for i in range(3)]


def test_a_table_with_odd_rows(tmp_path):
    root = write_imagefolder(tmp_path / "data", 4, masks=False)
    long = "word " * 40_000
    rows = [b"file_name,text", b"images/000.png,fine", b"images/001.png,caf\xe9", b"images/002.png", b""]
    rows += [b"images/003.png," + long.encode() + b",more,and more"]
    (root / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_bytes(b"\n".join(rows))
    source = opened(root, condition=ConditionConfig())
    assert source[0].caption == "fine" and source[3].caption == long.strip()
    for index, words in ((1, "surrogate"), (2, "no caption")):
        with pytest.raises(ValueError, match=words):
            source[index]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [("utf-16", "is UTF-16; save it as UTF-8"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")],
)
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_list_in_another_encoding_is_one_sentence(tmp_path, name, encoding, words):
    picture(0).save(tmp_path / "a.png")
    text = '{"file_name": "a.png", "text": "x"}' if name.endswith("jsonl") else "file_name,text\na.png,x"
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=words) as error:
        opened(tmp_path, condition=ConditionConfig())
    assert name in str(error.value)


def test_a_list_that_is_no_file_or_there_twice(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no metadata.jsonl .* but 1 images; .*make_dataset.py --images"):
        opened(tmp_path)
    place = tmp_path / "metadata.jsonl"
    place.mkdir()
    with pytest.raises(ValueError, match="metadata.jsonl is not a regular file"):
        opened(tmp_path)
    place.rmdir()
    os.mkfifo(place)
    with pytest.raises(ValueError, match="metadata.jsonl is not a regular file"):
        opened(tmp_path)
    place.unlink()
    place.symlink_to(place)
    with pytest.raises(ValueError, match="metadata.jsonl cannot be read"):
        opened(tmp_path)
    place.unlink()
    place.write_text("\n\n")
    with pytest.raises(ValueError, match="is empty; it needs a line per image"):
        opened(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="both metadata.csv and metadata.jsonl"):
        opened(tmp_path)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_byte_order_marks_and_line_ends(tmp_path, ending):
    root = write_imagefolder(tmp_path / "data", 3)
    lines = [
        json.dumps(line | {"text": f"a\u2028b\x85{i}"}, ensure_ascii=False).encode()
        for i, line in enumerate(read_metadata(root))
    ]
    (root / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + ending.join(lines))
    source = opened(root)
    assert [source[i].caption for i in range(3)] == [f"a\u2028b\x85{i}" for i in range(3)]
    folders = to_folders(write_imagefolder(tmp_path / "other", 2), tmp_path / "folders")
    (folders / "000" / "caption.txt").write_bytes(b"\xef\xbb\xbfa blue disc\r\n")
    (folders / "001" / "caption.txt").write_bytes("a blue disc".encode("utf-16"))
    source = opened(folders, "folder", condition=ConditionConfig(kind="depth"))
    assert source[0].caption == "a blue disc"
    with pytest.raises(ValueError, match="UTF-16"):
        source[1]


def test_shards_with_other_columns_are_named(tmp_path):
    image = [{"bytes": png(picture(0)), "path": None}]
    tables = {"train-0": {"image": image, "text": ["a"]}, "train-1": {"image": image, "caption": ["b"]}}
    (tmp_path / "data").mkdir()
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / "data" / f"{name}.parquet")
    with pytest.raises(ValueError, match="train-1.parquet has no column 'text', but train-0.parquet has"):
        opened(tmp_path / "data", "parquet", condition=ConditionConfig())
    pq.write_table(pa.table({"score": [1.0], "text": ["b"], "image": image}), tmp_path / "data" / "train-1.parquet")
    assert (
        len(opened(tmp_path / "data", "parquet", condition=ConditionConfig())) == 2
    )  # what is not asked for may differ
    pq.write_table(pa.table({"text": [{"x": 7}], "image": image}), tmp_path / "data" / "train-1.parquet")
    with pytest.raises(ValueError, match="cannot be loaded: .*struct<x: int64>") as error:
        opened(tmp_path / "data", "parquet", condition=ConditionConfig())
    assert "An error occurred" not in str(error.value)


def test_of_a_small_set_one_example_is_held_out(tmp_path):
    root = write_imagefolder(tmp_path / "data", 15)
    names = [line["file_name"] for line in read_metadata(root)]
    share = places_of(names).min() / 2
    train, val = (opened(root, part=part, validation_share=share) for part in ("train", "val"))
    assert (len(train), len(val)) == (14, 1) and not set(keys(train)) & set(keys(val))
    assert train.note == val.note and "selects none of 15 rows, so one is held out" in train.note
    large = opened(root, validation_share=0.5)
    assert large.note == "" and keys(val)[0] in keys(opened(root, part="val", validation_share=0.5))
    assert held_out(["a"], 0.01)[0].tolist() == [False] and held_out(["a", "a#2"], 1e-9)[0].tolist() == [False, False]
    assert sum(held_out(["a", "a#2", "b"], 1e-9)[0]) in (1, 2)
    with pytest.raises(ValueError, match="raise data.validation_share.$"):
        opened(root, part="val", validation_share=0)
    for share in (0.05, 0.999):  # whatever its hash: it can be trained on, without validation
        assert [held_out([key], share)[0].tolist() for key in "ab"] == [[False], [False]]
    assert held_out(["a"], 1)[0].tolist() == [True]
    with pytest.raises(ValueError, match="None of the 1 rows .* add a second example.$"):
        opened(write_imagefolder(tmp_path / "one", 1), part="val", validation_share=0.05)


def test_a_walk_counts_only_when_asked(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    walk = Walk(tmp_path)
    assert [len(files) for _, _, files in walk] == [1] and count_words(walk.left_out) == ""
    assert count_words(Counter({"x": 1, "y": 2, "z": 0})) == "2 y, 1 x"


def test_lists_that_were_joined_keep_all_their_rows(tmp_path):
    one = b'\xef\xbb\xbf{"file_name": "a.png"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(one + one)
    assert [json.loads(line) for _, line in metadata_lines(tmp_path / "metadata.jsonl")] == [{"file_name": "a.png"}] * 2
