"""Sizes of images from headers: what decoding finds, read once, by several processes together."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from file_data import picture, read_metadata, write_imagefolder, write_metadata
from PIL import Image

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, image_sizes, open_files
from localctl.images import ImageError, Limits, photo_size, read_photo

SHAPES = ((40, 40), (30, 60), (64, 32))


@pytest.fixture
def folder(tmp_path):
    return write_imagefolder(tmp_path / "data", 9, sizes=SHAPES)


def opened(folder):
    return open_files(DataConfig(path=str(folder), validation_share=0, resolution=32), ConditionConfig(), "train")


def sizes(folder, place=None, **options):
    source = opened(folder)
    return image_sizes.image_sizes(source.rows, source.indices, 10_000, place, **options)


EXPECTED = [list(SHAPES[i % 3]) for i in range(9)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_header_tells_what_decoding_finds(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    turned = {} if kind in ("BMP", "GIF") else {"exif": exif}
    Image.new("RGB", (50, 30)).save(buffer, kind, **turned)
    content = buffer.getvalue()
    (tmp_path / "image").write_bytes(content)
    expected = (50, 30) if turned and orientation >= 5 else (30, 50)
    assert read_photo(content, "it", Limits())[1] == expected
    for source in (content, tmp_path / "image", io.BytesIO(content)):
        assert photo_size(source, "it", Limits()) == expected


def test_headers_are_refused_like_images(tmp_path):
    with pytest.raises(ImageError, match="There is no image file"):
        photo_size(tmp_path / "gone.png", "it", Limits())
    with pytest.raises(ImageError, match="it is not a PNG"):
        photo_size(b"<html>", "it", Limits())
    (tmp_path / "large.png").write_bytes(b"")
    picture(0, (200, 200)).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match="over 10,000 pixels"):
        photo_size(tmp_path / "large.png", "it", Limits(10_000))


def test_sizes_are_read_once_and_again_when_images_change(folder, tmp_path, monkeypatch):
    read, size = [], image_sizes.photo_size
    monkeypatch.setattr(image_sizes, "photo_size", lambda *a: read.append(a) or size(*a))
    assert sizes(folder, tmp_path).tolist() == EXPECTED and len(read) == 9
    monkeypatch.setattr(image_sizes, "sample", lambda count: iter([0]))
    read.clear()
    assert sizes(folder, tmp_path).tolist() == EXPECTED and len(read) == 1  # a sample is compared
    read.clear()
    Image.new("RGB", (33, 44)).save(folder / "images" / "000.png")
    assert sizes(folder, tmp_path)[0].tolist() == [44, 33] and len(read) == 10
    write_metadata(folder, read_metadata(folder)[1:])  # other rows
    assert sizes(folder, tmp_path).tolist() == EXPECTED[1:]
    for damage in (b"", b"damaged", (tmp_path / image_sizes.SIZES).read_bytes()[:60]):
        (tmp_path / image_sizes.SIZES).write_bytes(damage)
        assert sizes(folder, tmp_path).tolist() == EXPECTED[1:]


def test_unusable_images_have_no_size(folder):
    (folder / "images" / "001.png").unlink()
    (folder / "images" / "002.png").write_bytes(b"<html>")
    picture(0, (200, 200)).save(folder / "images" / "003.png")
    found = sizes(folder).tolist()
    assert found[1:4] == [[0, 0]] * 3 and found[4:] == EXPECTED[4:]


def test_columns_of_sizes_replace_the_headers(folder, monkeypatch):
    lines = [line | {"height": 100 + i, "width": 200 + i} for i, line in enumerate(read_metadata(folder))]
    write_metadata(folder, lines)
    monkeypatch.setattr(image_sizes, "photo_size", None)
    assert sizes(folder).tolist() == [[100 + i, 200 + i] for i in range(9)]
    monkeypatch.undo()
    for odd in (None, "100", 0, -8, 1.5, 2**40):  # unless all rows have them
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*lines[:-1], lines[-1] | {"width": odd}])))
        assert sizes(folder).tolist() == EXPECTED


def test_processes_share_the_headers(folder, tmp_path, monkeypatch):
    read, size = [], image_sizes.photo_size
    monkeypatch.setattr(image_sizes, "photo_size", lambda *a: read.append(a) or size(*a))
    monkeypatch.setattr(image_sizes, "sample", lambda count: iter(()))
    given, barrier = {}, Barrier(2)

    def gather(rank, items):
        given[rank] = items
        barrier.wait()
        both = [*given[0], *given[1]]
        barrier.wait()
        return both

    def process(rank):
        gathered = lambda items: gather(rank, items)  # noqa: E731
        return sizes(folder, tmp_path / str(rank), rank=rank, world_size=2, gather=gathered)

    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    for _ in range(2):  # folders that differ, as on two machines: only the first has the file the second time
        read.clear()
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(process, range(2)))
        assert all(np.array_equal(one, EXPECTED) for one in found) and len(read) == 9
    assert (tmp_path / "0" / image_sizes.SIZES).exists() and not (tmp_path / "1" / image_sizes.SIZES).exists()
