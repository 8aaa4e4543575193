"""Outlines, regions, heat maps, contact sheets and the labels on them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont

from localctl import drawing, images
from localctl.drawing import (
    EDGE_COLORS,
    LINE,
    captioned,
    fitted,
    grid,
    outline,
    overlay_edges,
    overlay_heat,
    render_layout,
    write_beside,
)
from localctl.labels import one_line, shorten
from localctl.layout import Layout, Region

LEFT = (0.0, 0.0, 0.5, 1.0)

CAPTIONS = (
    *("one\ntwo", "one\r\ntwo\n\nthree\n", "\t\ttabs\t", "\n" * 5000, "x" * 5000, "wide words " * 10_000),
    *("\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467", "שלום עולם", "\u202eturned", "half \ud83d", "\ude00"),
    *("a\x00b\x07\x1b[31m", "a\u2028b\u2029c\x85d", "", " ", "e\u0301" * 3000, "漢字" * 3000),
)


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
    assert np.array_equal(np.asarray(outline(gray, mask[0])), np.asarray(outline(gray, mask)))
    assert np.asarray(gray).min() == np.asarray(gray).max()  # the original is untouched


def test_outline_of_full_empty_and_wrong_masks() -> None:
    gray = Image.new("RGB", (20, 10), "gray")
    frame = (np.asarray(outline(gray, torch.ones(1, 10, 20))) != np.asarray(gray)).any(axis=-1)
    assert frame[0].all() and frame[:, -1].all() and not frame[1:-1, 1:-1].any()
    assert np.array_equal(np.asarray(outline(gray, torch.zeros(1, 10, 20))), np.asarray(gray))
    with pytest.raises(ValueError, match="mask is 10x20 but the image is 20x10"):
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


@pytest.mark.parametrize("caption", CAPTIONS)
def test_no_caption_stops_a_sheet(caption: str) -> None:
    cell = Image.new("RGB", (60, 20), "white")
    grid([[cell]], [caption], [caption])
    assert captioned(cell, [caption, "b"]).size == (60, 20 + 2 * LINE)
    assert shorten(caption).isprintable() and len(shorten(caption)) <= 120


def test_labels_end_where_they_did() -> None:
    def one_letter_at_a_time(text: str, width: int) -> str:
        font = ImageFont.load_default()
        if font.getlength(text) <= width:
            return text
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        return text + "..."

    words = "A blue disc, WAVY lines: il.| and a red box " * 3
    for end in range(0, len(words), 7):
        for width in (10, 57, 200):
            text = " ".join(words[:end].split())
            assert fitted(text, width) == one_letter_at_a_time(text, width)


def test_a_caption_of_several_lines_is_one_line_of_words() -> None:
    assert one_line(" one\ntwo\r\n\tthree\u2028four\x00\u202efive\ud83d\n") == "one two three four five"
    assert fitted("one\ntwo", 500) == "one two"


def test_long_captions_are_not_measured_letter_by_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    length = drawing._length
    monkeypatch.setattr(drawing, "_length", lambda text: (measured.append(len(text)), length(text))[1])
    assert fitted("word " * 20_000, 300).endswith("...")
    assert len(measured) < 20 and max(measured) < 2_100


def test_grid_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        grid([[]])
    with pytest.raises(ValueError, match="column labels for 1 columns"):
        grid([[Image.new("RGB", (12, 8))]], ["a", "b"])


def test_every_region_of_a_layout_is_shown() -> None:
    disc = Region.disc("dog", (0.7, 0.5), 0.3)
    layout = Layout("a cat, a dog", 64, 128, (Region("cat", LEFT), disc))
    shown = np.asarray(render_layout(layout))
    assert shown.shape == (64, 128, 3) and len(np.unique(shown.reshape(-1, 3), axis=0)) >= 3
    gray = Image.new("RGB", (96, 48), "gray")
    assert render_layout(layout, gray).size == (96, 48) and gray.getcolors() == [(96 * 48, (128, 128, 128))]
    with pytest.warns(DeprecationWarning, match="render_layout"):
        assert np.array_equal(np.asarray(layout.draw()), shown)


def test_a_name_at_the_edge_is_shown_whole() -> None:
    def letters(box: tuple[float, float, float, float]) -> int:
        layout = Layout("an old sailboat", 64, 128, (Region("old sailboat", box),))
        shown = np.asarray(render_layout(layout, Image.new("RGB", (128, 64)))).astype(int)
        return int((shown.sum(axis=2) > 3 * 200).sum())  # the white behind them

    assert letters((0.8, 0.8, 1.0, 1.0)) == pytest.approx(letters((0.1, 0.2, 0.4, 0.9)), rel=0.1)


def test_names_of_regions_that_cover_each_other_are_all_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[tuple[int, int, int, int]]] = []
    monkeypatch.setattr(drawing, "write_beside", lambda *args: (write_beside(*args), taken.append(args[-1])))
    words = ["apple", "bird", "cup", "door", "egg", "fox", "gate", "hat"]
    for box in ((0.0, 0.0, 1.0, 1.0), (0.4, 0.45, 0.6, 0.55), (0.9, 0.9, 1.0, 1.0)):
        image = render_layout(Layout(" ".join(words), 128, 128, tuple(Region(word, box) for word in words)))
        boxes = taken[-1]
        assert len(boxes) == 8
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and top >= 0 and right < image.width and bottom < image.height
            assert not any(left <= r and x <= right and top <= b and y <= bottom for x, y, r, b in boxes[:i])


def test_more_names_than_there_is_room_for() -> None:
    words = [f"word{i}" for i in range(120)]
    layout = Layout(" ".join(words), 64, 64, tuple(Region(word, (0.0, 0.0, 1.0, 1.0)) for word in words))
    assert render_layout(layout).size == (64, 64)
    long = "a caption\nof two lines, and far wider than the image " * 40
    assert render_layout(Layout(long, 64, 64, (Region(long, LEFT),))).size == (64, 64)


def test_heat_is_laid_over_the_image_on_its_own_scale() -> None:
    heat = torch.zeros(4, 4)
    heat[0, 0] = 0.1
    shown = np.asarray(overlay_heat(Image.new("RGB", (32, 32)), heat)).astype(int).sum(axis=-1)
    assert shown[:4, :4].min() > shown[16:, 16:].max()
    assert np.array_equal(
        shown, np.asarray(overlay_heat(Image.new("RGB", (32, 32)), 7 * heat)).astype(int).sum(axis=-1)
    )


def test_painting_is_still_found_where_it_was() -> None:
    with pytest.warns(DeprecationWarning, match=r"localctl\.images\.grid is now localctl\.drawing\.grid"):
        assert images.grid is grid
    with pytest.raises(AttributeError, match="nothing"):
        images.nothing  # noqa: B018


def test_edges_have_their_colours_on_a_darkened_image() -> None:
    gray = Image.new("RGB", (128, 64), (200, 200, 200))
    edges = np.zeros((3, 64, 128), bool)
    edges[0, 10], edges[1, 20], edges[2, 30] = True, True, True
    edges[1, 10, :4] = True  # missed beside a match: the match is on top
    mask = np.zeros((64, 128), np.float32)
    mask[:, :64] = 1
    result = np.asarray(overlay_edges(gray, *edges, mask=mask))
    assert result.shape == (128, 256, 3)  # twice, as narrower images are hard to see
    for row, name in ((20, "matched"), (40, "missed"), (60, "invented")):
        assert (result[row : row + 2] == ImageColor.getrgb(EDGE_COLORS[name])).all()
    assert result[100, 10, 0] == 90 and result[100, 200, 0] == 40  # inside and outside the mask
