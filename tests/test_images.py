import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localctl import images
from localctl.images import grid, load_image, open_image, outline, to_pil, to_pixels


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
    refused(tmp_path / "a.png", "not a PNG, JPEG, WEBP picture")


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


@pytest.mark.parametrize(("suffix", "message"), [("gif", "not a PNG"), ("png", "animated"), ("webp", "animated")])
def test_animations_are_refused(tmp_path: Path, suffix: str, message: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture().save(path, save_all=True, append_images=[picture().rotate(180)], duration=100)
    refused(path, message)


def test_gif_named_png_is_refused(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.gif", save_all=True, append_images=[picture().rotate(180)])
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    refused(tmp_path / "a.png", "not a PNG")


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


def test_outline_draws_the_inner_border_only() -> None:
    gray = Image.new("RGB", (20, 10), "gray")
    mask = torch.zeros(1, 10, 20)
    mask[0, 2:8, 5:15] = 1
    drawn = np.asarray(outline(gray, mask))
    changed = (drawn != np.asarray(gray)).any(axis=-1)
    expected = np.zeros((10, 20), bool)
    expected[2:8, 5:15] = True
    expected[3:7, 6:14] = False
    assert np.array_equal(changed, expected)
    assert same(outline(gray, mask[0]), outline(gray, mask))
    assert np.asarray(gray).min() == np.asarray(gray).max()  # the original is untouched


def test_outline_of_full_empty_and_wrong_masks() -> None:
    gray = Image.new("RGB", (20, 10), "gray")
    frame = (np.asarray(outline(gray, torch.ones(1, 10, 20))) != np.asarray(gray)).any(axis=-1)
    assert frame[0].all() and frame[:, -1].all() and not frame[1:-1, 1:-1].any()
    assert same(outline(gray, torch.zeros(1, 10, 20)), gray)
    with pytest.raises(ValueError, match="mask is 10x20 but the picture is 20x10"):
        outline(gray, torch.ones(1, 20, 10))


def test_grid_places_every_picture() -> None:
    red, blue, small = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue"), Image.new("L", (10, 10))
    sheet = np.asarray(grid([[red, blue], [small]], pad=2))
    assert sheet.shape == (2 + 2 * 22, 2 + 2 * 32, 3)
    assert (sheet[2:22, 2:32] == (255, 0, 0)).all() and (sheet[2:22, 34:64] == (0, 0, 255)).all()
    assert (sheet[24 + 5 : 24 + 15, 2 + 10 : 2 + 20] == 0).all()  # centred in its cell
    assert (sheet[24:44, 34:64] == 255).all()


def test_grid_labels() -> None:
    cell = Image.new("RGB", (60, 20), "white")
    plain = grid([[cell, cell], [cell, cell]])
    labelled = grid([[cell, cell], [cell, cell]], ["left", "a label far too long for sixty pixels"], ["row one", "two"])
    assert labelled.height > plain.height and labelled.width == plain.width
    ink = np.asarray(labelled).min(axis=-1) < 128
    assert ink[:14, :64].any() and ink[:14, 68:].any()  # both column labels
    assert not ink[:14, 64:68].any() and not ink[:14, 128:].any()  # shortened to their own column
    assert ink.any(axis=1).nonzero()[0].max() > 50  # the second row's caption


def test_grid_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        grid([[]])
    with pytest.raises(ValueError, match="labels for 1 columns"):
        grid([[picture()]], ["a", "b"])


def test_no_global_pillow_setting_is_changed() -> None:
    from PIL import ImageFile

    assert Image.MAX_IMAGE_PIXELS == 89_478_485 and ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert images.MAX_PIXELS == 16_000_000
