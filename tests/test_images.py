import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngInfo

from localctl import images
from localctl.images import (
    Limits,
    load_image,
    open_image,
    read_photo,
    to_pil,
    to_pixels,
)
from localctl.sizes import PHOTO_PIXELS


def picture(width: int = 12, height: int = 8) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


def same(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def refused(path: Path, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message) as error:
            load_image(path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and text.count(". ") == 0 and text.endswith(".")


@pytest.mark.parametrize(("name", "exact"), [("a.png", True), ("a.webp", True), ("a.jpg", False)])
def test_formats(tmp_path: Path, name: str, exact: bool) -> None:
    picture(64, 40).save(tmp_path / name, lossless=True)  # which only WEBP knows
    loaded = load_image(tmp_path / name)
    assert loaded.mode == "RGB" and loaded.size == (64, 40)
    assert not exact or same(loaded, picture(64, 40))
    assert load_image(str(tmp_path / name)).size == (64, 40)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "no.png", "no image file")
    refused(tmp_path, "no image file")


@pytest.mark.parametrize(
    "content", [b"<html><body>404</body></html>", b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_other_content_named_png(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "not a PNG, JPEG, WEBP, .* image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix])
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    refused(path, "damaged|not a PNG")


def test_flipped_bytes_raise_nothing_but_value_errors(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(32, 32).save(buffer, "PNG")
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for _ in range(4):
            data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "a.png").write_bytes(data)
        try:
            load_image(tmp_path / "a.png")
        except ValueError as error:
            assert str(tmp_path / "a.png") in str(error)


@pytest.mark.parametrize("size", [(4001, 4001), (12_000, 12_000), (20_000, 20_000), (1, 100_000), (100_000, 1)])
def test_bombs_are_refused_before_decoding(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(*size))

    def explode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", explode)
    refused(tmp_path / "bomb.png", "scale it down")


def test_the_cap_itself_is_allowed(tmp_path: Path) -> None:
    Image.new("1", (4000, 4000)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (4000, 4000)


@pytest.mark.parametrize("suffix", ["png", "webp", "avif"])
def test_animations_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture(32, 32).save(path, save_all=True, append_images=[picture(32, 32).rotate(180)], duration=100)
    refused(path, "animated")


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.png"])  # named after what it is, or not
def test_of_a_gif_and_a_tiff_the_first_frame_is_read(tmp_path: Path, name: str) -> None:
    gray = [Image.new("L", (12, 8), value) for value in (50, 200)]
    gray[0].save(tmp_path / name, "TIFF" if name == "a.tif" else "GIF", save_all=True, append_images=gray[1:])
    assert np.unique(np.asarray(load_image(tmp_path / name))).tolist() == [50]


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.bmp", "BMP"), ("a.tiff", "TIFF"), ("a.jp2", "JPEG2000"), ("a.ppm", "PPM"), ("a.avif", "AVIF")]
    + [("a.jfif", "JPEG"), ("a.dib", "DIB"), ("a.apng", "PNG"), ("a.jpf", "JPEG2000")],
)  # fmt: skip
def test_every_extension_is_read(tmp_path: Path, name: str, format: str) -> None:
    Image.new("RGB", (32, 24), (200, 40, 90)).save(tmp_path / name, format)
    assert Path(name).suffix in images.EXTENSIONS
    assert np.abs(np.asarray(load_image(tmp_path / name)).astype(int) - (200, 40, 90)).max() <= 3


def test_formats_that_run_or_draw_something_are_not_opened(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.eps")
    refused(tmp_path / "a.eps", "not a PNG")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    refused(tmp_path / "a.tif", "floating-point")
    Image.fromarray(np.full((4, 4), 100_000, np.int32)).save(tmp_path / "a.tif")
    refused(tmp_path / "a.tif", "32-bit")


@pytest.mark.parametrize("kind", ["zTXt", "tEXt", "iCCP"])
def test_long_texts_and_profiles_are_passed_over(tmp_path: Path, kind: str) -> None:
    text, extra = PngInfo(), {}
    if kind == "iCCP":
        extra["icc_profile"] = bytes(2_000_000)
    else:
        text.add_text("workflow", "x" * (2_000_000 if kind == "zTXt" else 70_000_000), zip=kind == "zTXt")
    picture().save(tmp_path / "a.png", pnginfo=text, **extra)
    assert same(load_image(tmp_path / "a.png"), picture())
    half = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(half[:-60])
    refused(tmp_path / "a.png", "damaged")


def test_what_the_disk_refuses_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (
        ("loop.png", "cannot be read"),
        ("a" * 300 + ".png", "cannot be read"),
        ("b" * 5000, "cannot be read"),
        ("\ud83d.png", "cannot be read"),
        ("pipe.png", "no image file"),
        ("loop.png/x.png", "cannot be read"),
    ):
        with pytest.raises(images.ImageError, match=words) as error:
            load_image(tmp_path / name)
        assert len(str(error.value)) < 500


def big_jpeg(path: Path, width: int = 6000, height: int = 4000, orientation: int = 1) -> None:
    """24 megapixels, the upper half of the file white."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("L", (width, height))
    image.paste(255, (0, 0, width, height // 2))
    image.save(path, "JPEG", exif=exif, quality=80)


def test_a_camera_photo_is_refused_whole_and_read_smaller_where_it_is_scaled_down(tmp_path: Path) -> None:
    big_jpeg(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", "6000x4000, over 16,000,000 pixels")
    limits = Limits(pixels=PHOTO_PIXELS, cover=(512, 768))
    photo, size = read_photo(tmp_path / "a.jpg", "", limits)
    assert size == (4000, 6000) and photo.size == (3000, 2000)
    big_jpeg(tmp_path / "side.jpg", orientation=6)  # rotate 90 degrees clockwise to view: white on the right
    photo, size = read_photo(tmp_path / "side.jpg", "", limits)
    assert size == (6000, 4000) and photo.size == (2000, 3000)
    assert np.asarray(photo)[:, 1010:].min() > 250 and np.asarray(photo)[:, :990].max() < 5
    with pytest.raises(images.ImageError, match="over 20,000,000"):
        read_photo(tmp_path / "a.jpg", "", Limits(pixels=20_000_000, cover=(512, 512)))
    assert Limits(cover=(512, 512)).shrink((4000, 4000)) == 1  # up to 16 million: as ever


def test_a_jpeg_is_decoded_small_not_only_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big_jpeg(tmp_path / "a.jpg", 8000, 6000)
    decoded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: (decoded.append(self.size), load(self))[1])
    read_photo(tmp_path / "a.jpg", "", Limits(pixels=PHOTO_PIXELS, cover=(256, 256)))
    assert max(decoded) == (1000, 750)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "I;16"])
def test_other_large_images_shrink_by_area(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    array = np.zeros((1024, 1024), np.uint16 if mode == "I;16" else np.uint8)
    array[:, 512:] = 65535 if mode == "I;16" else 255
    image = Image.fromarray(array) if mode == "I;16" else Image.fromarray(array).convert(mode)
    image.save(tmp_path / "a.png", compress_level=1)
    limits = Limits(pixels=PHOTO_PIXELS, cover=(128, 128))
    for gray in (False, True):
        photo, size = read_photo(tmp_path / "a.png", "", limits, gray)
        assert size == (1024, 1024) and photo.size == (256, 256)
        row = np.asarray(photo if gray else photo.convert("L"))[125]
        assert row[:128].max() == 0 and row[128:].min() == (1 if gray else 255)


def test_photos_with_a_second_frame_are_taken(tmp_path: Path) -> None:
    picture(32, 32).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[picture(16, 16)])
    assert load_image(tmp_path / "a.jpg").size == (32, 32)


def test_exif_turns_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    half = np.zeros((16, 32, 3), np.uint8)
    half[:, :16] = 255  # white on the left, so on top once upright
    Image.fromarray(half).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(load_image(tmp_path / "a.png"))
    assert upright.shape == (32, 16, 3) and upright[:16].min() == 255 and upright[16:].max() == 0


def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 40_000, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as raw:
        assert raw.mode.startswith("I")  # or this test shows nothing
    assert np.asarray(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 156, 255]


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    array = np.zeros((1, 3, 4), np.uint8)
    array[0, :, 0] = 200
    array[0, :, 3] = (0, 128, 255)
    Image.fromarray(array).save(tmp_path / "rgba.png")
    assert np.asarray(load_image(tmp_path / "rgba.png"))[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    assert open_image(tmp_path / "rgba.png").mode == "RGBA"
    Image.fromarray(array).convert("LA").save(tmp_path / "la.png")
    assert np.asarray(load_image(tmp_path / "la.png"))[0, 0].tolist() == [255, 255, 255]


def test_palette_gray_and_bits(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    assert np.asarray(load_image(tmp_path / "p.png"))[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    palette.save(tmp_path / "t.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "t.png"))[0].tolist() == [[255, 255, 255], [200, 100, 50]]
    Image.new("L", (2, 1), 77).save(tmp_path / "l.png")
    assert np.asarray(load_image(tmp_path / "l.png"))[0, 0].tolist() == [77, 77, 77]
    Image.new("1", (2, 1), 1).save(tmp_path / "1.png")
    assert np.asarray(load_image(tmp_path / "1.png"))[0, 0].tolist() == [255, 255, 255]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = np.asarray(load_image(tmp_path / "a.jpg"))[8, 8].astype(int)
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_nothing_of_the_files_metadata_is_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "at home"
    picture().save(tmp_path / "a.jpg", exif=exif)
    loaded = load_image(tmp_path / "a.jpg")
    assert not loaded.info
    loaded.save(tmp_path / "b.jpg")
    assert b"at home" in (tmp_path / "a.jpg").read_bytes() and b"at home" not in (tmp_path / "b.jpg").read_bytes()


def test_pixels_round_trip() -> None:
    pixels = to_pixels(picture())
    assert pixels.shape == (3, 8, 12) and pixels.dtype == torch.float32
    assert same(to_pil(pixels), picture())
    ends = to_pixels(Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)))
    assert ends[0, 0].tolist() == [-1, 1]
    assert np.asarray(to_pil(torch.tensor([-3.0, 3.0]).expand(3, 1, 2)))[0, :, 0].tolist() == [0, 255]


def test_to_pil_refuses_what_is_no_picture() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_pil(torch.full((3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"\(3, H, W\), not \(1, 3, 2, 2\)"):
        to_pil(torch.zeros(1, 3, 2, 2))


def test_no_global_pillow_setting_is_changed() -> None:
    from PIL import ImageFile, PngImagePlugin

    assert Image.MAX_IMAGE_PIXELS == 89_478_485 and ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert images.MAX_PIXELS == 16_000_000 and PngImagePlugin.MAX_TEXT_CHUNK == 2**20
