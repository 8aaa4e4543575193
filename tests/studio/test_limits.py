"""What the page may ask for: every field has a type and bounds, and what is outside is one sentence."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from localctl.studio import limits

BOX = [0.1, 0.2, 0.5, 0.6]


def region(**changes: Any) -> dict[str, Any]:
    return {"id": "r1", "color": 0, "phrase": "a cat", "box": BOX, **changes}


def scene(*regions: Any, **changes: Any) -> dict[str, Any]:
    return {"width": 128, "height": 64, "regions": list(regions), **changes}


def png(array: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_scene_is_read_with_the_defaults_of_regions() -> None:
    read = limits.scene(scene(region()))
    assert (read.width, read.height) == (128, 64)
    assert read.regions[0].box == tuple(BOX)
    assert (read.regions[0].strength, read.regions[0].start, read.regions[0].end) == (1.0, 0.0, 1.0)


def test_a_mask_is_read_from_its_png() -> None:
    mask = np.zeros((16, 32), np.uint8)
    mask[:8] = 255
    read = limits.scene(scene(region(box=None, mask=png(mask)))).regions[0].mask
    assert read is not None and read.shape == (16, 32)
    assert read[:8].min() == 1.0 and read[8:].max() == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "../etc"),
        ("id", "<b>"),
        ("id", 7),
        ("id", ""),
        ("color", 99),
        ("color", -1),
        ("phrase", ["a"]),
        ("phrase", "x" * 301),
        ("phrase", "half \ud800"),
        ("occurrence", 1.5),
        ("box", "0,0,1,1"),
        ("box", [0, 0, 1]),
        ("box", [0.5, 0, 0.4, 1]),
        ("box", [0, 0, float("nan"), 1]),
        ("box", [0, 0, 2, 1]),
        ("strength", "1"),
        ("strength", float("inf")),
        ("strength", True),
        ("strength", 10**400),
        ("outside_strength", -11),
        ("start", 1.5),
        ("end", 0.0),
        ("prompt", {"a": 1}),
        ("negative_prompt", 0),
    ],
)
def test_a_region_out_of_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="[Rr]egion 1") as error:
        limits.scene(scene(region(**{name: value})))
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "scene",
        scene(width=100),
        scene(width=32),
        scene(height=4096),
        scene(width="128"),
        scene(*[region(id=f"r{n}") for n in range(17)]),
        scene(region(), region()),
        scene("region"),
        {"width": 128, "height": 128, "regions": "r"},
    ],
)
def test_a_scene_out_of_bounds_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"\."):
        limits.scene(value)


def bomb() -> bytes:
    """Return a PNG of 30000x30000 pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (30000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    data = zlib.compress(bytes(30000 * 3751 // 100), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


MASKS = {
    "a path": "/etc/passwd",
    "an address": "http://127.0.0.1/x.png",
    "an SVG": "data:image/svg+xml;base64,PHN2Zy8+",
    "HTML": "data:image/png;base64," + base64.b64encode(b"<html></html>").decode(),
    "not base64": "data:image/png;base64,!!!",
    "a damaged PNG": "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\nrest").decode(),
    "a bomb": "data:image/png;base64," + base64.b64encode(bomb()).decode(),
    "too long": "data:image/png;base64," + "A" * (limits.MAX_MASK + 4),
    "a number": 5,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_mask_that_is_no_small_png_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match="region 1"):
        limits.scene(scene(region(box=None, mask=mask)))


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty"):
        limits.scene(scene(region(box=None, mask=png(np.zeros((8, 8), np.uint8)))))


def test_numbers_are_read_from_text() -> None:
    assert limits.numbers("The values", "0, .5; 1", 0, 5, 4) == [0, 0.5, 1]
    for bad in ("", "a", "1,1", "1,2,3,4,5", "nan", "9", None, 3):
        with pytest.raises(ValueError, match="The values"):
            limits.numbers("The values", bad, 0, 5, 4)


@pytest.mark.parametrize("seed", [1.5, float("nan"), "1", None, True, -1, 2**63, [1]])
def test_a_seed_is_a_whole_number_of_63_bits(seed: Any) -> None:
    with pytest.raises(ValueError, match="The seed"):
        limits.whole("The seed", seed, 0, limits.MAX_SEED)


def test_a_large_seed_keeps_all_its_digits() -> None:
    assert limits.whole("The seed", 2**62 + 1, 0, limits.MAX_SEED) == 2**62 + 1


def test_texts_choices_and_flags_have_their_types() -> None:
    assert limits.text("The prompt", None) == ""
    assert limits.choice("The method", "a", ("a", "b")) == "a"
    assert limits.choices("The parts", ["b", "a"], ("a", "b")) == ["b", "a"]
    assert limits.flag("It", None) is False
    for call in (
        lambda: limits.text("x", "a" * 1001),
        lambda: limits.text("x", "a\0"),
        lambda: limits.choice("x", "c", ("a", "b")),
        lambda: limits.choice("x", ["a"], ("a", "b")),
        lambda: limits.choices("x", ["a", "a"], ("a", "b")),
        lambda: limits.choices("x", "a", ("a", "b")),
        lambda: limits.flag("x", 1),
        lambda: limits.upload("x", "path", 10),
        lambda: limits.upload("x", b"12345678901", 10),
    ):
        with pytest.raises(ValueError, match=r"^x "):
            call()
