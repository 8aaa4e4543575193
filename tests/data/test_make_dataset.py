"""data/make_dataset.py: datasets for training from images."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from file_data import identities, opened, picture, write_metadata
from PIL import Image

from localctl import images
from localctl.conditions import ConditionConfig, extract
from localctl.data import BadRow, DataConfig, SampleRef, open_files
from localctl.images import load_image

sys.path.append(str(Path(__file__).parents[2] / "data"))
import make_dataset


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "more/a.png", "broken.png", "silent.png")):
        picture(i).save(root / name, quality=100)
        (root / name).with_suffix(".txt").write_text(f"picture {i}\n")
    (root / "broken.png").write_bytes(b"<html>")
    (root / "silent.txt").unlink()
    return root


def test_photos_without_any_caption_are_one_sentence_with_the_way_out(photos, tmp_path, capsys):
    argv = ["--images", str(photos / "more"), "--output", str(tmp_path / "out")]
    (photos / "more" / "a.txt").unlink()
    assert make_dataset.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "None of the 1 images" in said and "cat.jpg, cat.txt" in said and "--captions" in said
    (photos / "list.jsonl").write_text('{"file_name": "more/a.png", "text": "a door"}')
    assert make_dataset.main([*argv, "--captions", str(photos / "list.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "has a caption in" in error and "left out" not in error
    (photos / "list.jsonl").write_text('{"file_name": "a.png", "text": "a door"}')
    assert make_dataset.main([*argv, "--captions", str(photos / "list.jsonl")]) == 0
    assert capsys.readouterr().out.startswith("1 example in ")


@pytest.mark.parametrize("name", ["imagefolder", "folder"])
def test_a_folder_of_images_becomes_a_dataset(photos, tmp_path, capsys, name):
    masks = tmp_path / "masks"
    (masks / "more").mkdir(parents=True)
    for i, file in enumerate(("a.png", "b.png", "more/a.png")):
        picture(i).save(masks / file)
    argv = ["--images", str(photos), "--output", str(tmp_path / "out"), "--format", name]
    assert make_dataset.main([*argv, "--masks", str(masks), "--condition", "sobel"]) == 0
    captured = capsys.readouterr()
    assert "3 examples" in captured.out and "1 caption missing, 1 of unknown format" in captured.out
    assert "left out broken.png" in captured.err
    options = {"conditioning_image_column": "sobel"} if name == "imagefolder" else {}
    column = opened(tmp_path / "out", name, "column", **(options or {"conditioning_image_column": "sobel"}))
    for i in range(3):
        example = column[i]
        number = int(example.caption.split()[1])
        assert identities((example.pixels[:1] + 1) / 2) == identities(example.mask[None]) == [number]
    assert sorted(column[i].caption for i in range(3)) == ["picture 0", "picture 1", "picture 2"]
    assert make_dataset.main(argv) == 2 and "not empty" in capsys.readouterr().err


@pytest.fixture
def many(tmp_path):
    """A folder as users have it."""
    root = tmp_path / "many"
    kinds = {"a.JPG": "JPEG", "b.bmp": "BMP", "c.TIFF": "TIFF", "d.gif": "GIF", "e.avif": "AVIF", "f.jfif": "JPEG"}
    kinds |= {"g.jp2": "JPEG2000", "h.pgm": "PPM", ".hidden/i.png": "PNG", "@eaDir/j.png": "PNG", "._a.JPG": "JPEG"}
    for number, (name, kind) in enumerate(kinds.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, mode="L" if kind == "PPM" else "RGB").save(root / name, kind)
        (root / name).with_suffix(".txt").write_bytes(b"\xef\xbb\xbf" + f"picture {number}".encode())
    for name in ("k.heic", "l.HEIC", "m.psd", "Thumbs.db"):
        (root / name).write_bytes(b"x")
    return root


@pytest.mark.parametrize("name", ["imagefolder", "folder"])
def test_every_kind_of_image_is_taken_or_counted(many, tmp_path, capsys, name):
    for _ in range(2):  # the second call meets what the first one wrote
        out = many / f"out{_}"
        assert make_dataset.main(["--images", str(many), "--output", str(out), "--format", name]) == 0
        said = capsys.readouterr().out
        assert "8 examples" in said and "3 hidden image" in said and "2 .heic" in said and "1 .psd" in said
    assert "1 folder that this script wrote" in said
    source = opened(out, name)
    assert [source[i].caption for i in range(8)] == [f"picture {i}" for i in range(8)]
    assert identities(np.stack([(source[i].pixels[0] + 1) / 2 for i in range(8)])) == list(range(8))


def test_odd_files_are_left_out_by_name(photos, tmp_path, capsys):
    (photos / "loop.png").symlink_to("loop.png")
    os.mkfifo(photos / "pipe.png")
    (photos / "two.png").write_bytes((photos / "a.png").read_bytes())
    os.mkfifo(photos / "two.txt")
    deep = photos / "/".join(["long" * 20] * 4)
    deep.mkdir(parents=True)
    for name in ("a.png", "a.txt"):
        (deep / name).write_bytes((photos / name).read_bytes())
    (photos / "folder.png").mkdir()
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")).write_bytes((photos / "a.png").read_bytes())
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.txt")).write_text("x")
    assert make_dataset.main(["--images", str(photos), "--output", str(tmp_path / "out"), "--condition", "canny"]) == 0
    captured = capsys.readouterr()
    assert "3 examples" in captured.out
    for words in ("loop.png", "pipe.png", "two.png: two.txt is not a regular file", "rename it", "240 bytes"):
        assert words in captured.err, words


def test_two_images_never_share_a_name(tmp_path):
    for name in ("x/b.png", "x_b.png", "x/b_.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(tmp_path / "photos" / name)
        (tmp_path / "photos" / name).with_suffix(".txt").write_text(name)
    argv = ["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "out"), "--format", "folder"]
    assert make_dataset.main([*argv, "--condition", "canny"]) == 0
    assert sorted(opened(tmp_path / "out", "folder")[i].caption for i in range(3)) == ["x/b.png", "x/b_.png", "x_b.png"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_lists_of_captions(photos, tmp_path, capsys, kind):
    rows = [{"file_name": "./a.png", "text": ["one", "two"]}, {"file_name": "b.jpg", "text": "a\u2028b\x85c"}]
    rows += [{"file_name": "gone.png", "text": "x"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ["{broken", "[1]", "[" * 100_000]
    if kind == "csv":
        lines = ["file_name,text", "./a.png,one", "b.jpg,a\u2028b\x85c", "gone.png,x", "only.png", "", "broken"]
    listed = tmp_path / f"captions.{kind}"
    listed.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    argv = ["--images", str(photos), "--captions", str(listed)]
    assert make_dataset.main([*argv, "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "1 lines of" in captured.out and "name no image" in captured.out
    assert ("3" if kind == "jsonl" else "2") + " lines of" in captured.err
    source = opened(tmp_path / "out", "imagefolder")
    assert source[1].caption == "a\u2028b\x85c"
    captions = {source.visit(SampleRef(0, epoch), 0).caption for epoch in range(8)}
    assert captions == ({"one", "two"} if kind == "jsonl" else {"one"})
    assert make_dataset.main([*argv, "--output", str(tmp_path / "folders"), "--format", "folder"]) == 0
    assert ("1 images have several captions" in capsys.readouterr().out) == (kind == "jsonl")


@pytest.mark.parametrize("name", ["imagefolder", "folder"])
def test_splits_of_the_photos_stay_splits(photos, tmp_path, capsys, name):
    (photos / "more").rename(photos / "val")
    argv = ["--images", str(photos), "--output", str(tmp_path / "out"), "--format", name]
    assert make_dataset.main(argv) == 0
    assert "splits, by the names of folders: 1 validation" in capsys.readouterr().out
    data = DataConfig(name=name, path=str(tmp_path / "out"), resolution=32, validation_split="val")
    assert [len(open_files(data, ConditionConfig(), part)) for part in ("train", "val")] == [2, 1]


def test_images_none_of_which_can_be_used_are_an_error_and_leave_nothing_in_the_way(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"<html>")
    (tmp_path / "photos" / "a.txt").write_text("a")
    argv = ["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    assert make_dataset.main(argv) == 2
    assert "None of the 1 images can be used (1 of unknown format)." in capsys.readouterr().err
    picture(0).save(tmp_path / "photos" / "a.png")
    assert make_dataset.main(argv) == 0


def test_camera_photos_become_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "MAX_PIXELS", 500_000)  # of a camera of 1.5 megapixels
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (1500, 1000), 110).save(tmp_path / "photos" / "a.jpg", exif=exif)
    Image.new("L", (800, 820), 110).save(tmp_path / "photos" / "b.png")
    for name in "ab":
        (tmp_path / "photos" / f"{name}.txt").write_text("a field")
    argv = ["--images", str(tmp_path / "photos"), "--condition", "sobel"]
    assert make_dataset.main([*argv, "--output", str(tmp_path / "out")]) == 0
    source = opened(tmp_path / "out", "imagefolder", "column", conditioning_image_column="sobel")
    assert source[0].original == (1500, 1000, 8, 0) and source[1].original[:2] == (820, 800)
    assert identities((torch.stack([source[i].pixels for i in range(2)]) + 1) / 2) == [9, 9]
    small = opened(tmp_path / "out", "imagefolder", max_pixels=1_000_000)
    with pytest.raises(BadRow, match="over 1,000,000 pixels"):
        small[0]
    assert make_dataset.main([*argv, "--output", str(tmp_path / "o"), "--max_pixels", "1000000"]) == 0
    assert "1 example in" in (said := capsys.readouterr()).out.splitlines()[-2] and "left out a.jpg" in said.err


def test_a_full_disk_is_one_sentence(photos, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(make_dataset.shutil, "copyfile", full)
    assert make_dataset.main(["--images", str(photos), "--output", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


def test_conditions_are_those_of_training_and_captions_may_come_from_a_list(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "photos" / "x.png")
    write_metadata(tmp_path, [{"file_name": "x.png", "text": "grüne Wiese"}])
    argv = ["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "out"), "--condition", "canny"]
    assert make_dataset.main([*argv, "--captions", str(tmp_path / "metadata.jsonl")]) == 0
    assert opened(tmp_path / "out", "imagefolder")[0].caption == "grüne Wiese"
    written = np.asarray(load_image(next((tmp_path / "out" / "canny").iterdir())))[..., 0] / 255
    assert np.array_equal(written, extract(ConditionConfig(), np.asarray(load_image(tmp_path / "photos/x.png")))[0])
    for wrong in (["--images", "nowhere"], ["--images", str(tmp_path / "out" / "canny" / "none")]):
        assert make_dataset.main([*wrong, "--output", str(tmp_path / "other")]) == 2
    assert (
        make_dataset.main([*argv[:2], "--output", str(tmp_path / "o"), "--captions", str(tmp_path / "photos/x.png")])
        == 2
    )
    assert "--captions" in capsys.readouterr().err
