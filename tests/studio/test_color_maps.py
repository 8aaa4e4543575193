"""A colour map becomes one region per colour; uploads are read within limits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localctl.studio import limits
from localctl.studio.canvas import scene
from localctl.studio.color_maps import regions_by_color
from localctl.studio.uploads import read_photo


def file_of(array: np.ndarray, kind: str = "png", **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def colors() -> np.ndarray:
    array = np.full((96, 128, 3), 255, np.uint8)
    array[10:60, 10:60] = (200, 30, 30)
    array[40:90, 80:120] = (30, 60, 200)
    return array.repeat(4, axis=0).repeat(4, axis=1)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_each_colour_but_the_ground_is_a_region(colors: np.ndarray, kind: str) -> None:
    size, regions = regions_by_color(file_of(colors, kind))
    masks = [region.mask for region in limits.scene(scene(size, regions)).regions]
    assert size == (384, 512) and len(masks) == 2
    for mask, inside in zip(masks, ((80, 80), (240, 400)), strict=True):
        assert mask is not None and mask[inside] == 1 and mask[0, 0] == 0
        assert abs(float(mask.mean()) - (50 * 50 if inside == (80, 80) else 50 * 40) / (96 * 128)) < 0.02


def test_a_map_of_the_ground_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="no colour besides black and white"):
        regions_by_color(file_of(np.zeros((64, 64, 3), np.uint8)))


FILES = {
    "HTML": b"<html><script>alert(1)</script></html>",
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "a damaged PNG": file_of(np.zeros((64, 64, 3), np.uint8))[:60],
    "nothing": b"",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_files_that_are_no_image_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="The photo"):
        read_photo("The photo", str(path))
    with pytest.raises(ValueError, match="The colour map"):
        regions_by_color(content)


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (5000, 4000)).save(path)
    with pytest.raises(ValueError, match="16,000,000 pixels"):
        read_photo("The photo", str(path))
    Image.new("1", (40_000, 1)).save(path)
    with pytest.raises(ValueError, match="16,384"):
        read_photo("The photo", str(path))


def test_a_photo_is_read_upright_in_rgb_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "where I live"
    Image.new("L", (40, 20), 7).save(path, exif=exif)
    image = read_photo("The photo", str(path))
    assert image is not None and image.size == (20, 40) and image.mode == "RGB"
    kept = tmp_path / "kept.png"
    image.save(kept)
    assert b"where I live" not in kept.read_bytes()


def test_an_upload_that_is_gone_or_not_a_file_is_one_sentence(tmp_path: Path) -> None:
    assert read_photo("The photo", None) is None
    with pytest.raises(ValueError, match="not there any more"):
        read_photo("The photo", str(tmp_path / "gone.png"))
    with pytest.raises(ValueError, match="must be an upload"):
        read_photo("The photo", {"path": "/etc/passwd"})
