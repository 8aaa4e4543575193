"""Render outlines, labels, regions, heat maps and contact sheets.

Labels may be any caption, so each is shortened to one line that fits its place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from localctl.labels import MOST, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from localctl.layout import Layout

LINE = 14  # pixels from one line of text to the next
MOST_MOVED = 40  # labels in one image; with more, places at the edges of other labels are not tried
REGION_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
EDGE_COLORS = {
    "matched": "#2fd09a",
    "missed": "#56b4e9",
    "invented": "#ff7a1a",
}  # told apart by colour-blind people too
SMALLEST = 256  # pixels; narrower images with regions are enlarged, so that text fits under them

Box = tuple[int, int, int, int]


def outline(image: Image.Image, mask: Tensor, color: str = "magenta") -> Image.Image:
    """Render the inner border of a mask on a copy of ``image``.

    mask: (1,H,W) or (H,W) in [0,1]; values of at least 0.5 are inside. ValueError when the sizes differ.
    """
    inside = (mask.detach().float().cpu().reshape(mask.shape[-2:]).numpy() >= 0.5).astype(np.uint8)
    if inside.shape != (image.height, image.width):
        raise ValueError(
            f"The mask is {inside.shape[1]}x{inside.shape[0]} but the image is {image.width}x{image.height}."
        )
    width = max(1, min(inside.shape) // 128)
    # Pixels beyond the image count as outside the mask, so that a full mask is shown as a frame.
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    core = cv2.erode(inside, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    border = Image.fromarray((inside - core) * 255)
    result = image.convert("RGB")
    result.paste(color, (0, 0, *result.size), border)
    return result


def grid(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    pad: int = 4,
) -> Image.Image:
    """Compose a contact sheet: rows of images on white, with labels above the columns and above each row.

    Every cell has the size of the largest image, and smaller images are centred. Rows may differ in length. Labels that
    are too long for their place are shortened to end in "...".

    Args:
        rows: the images of each row.
        column_labels, row_labels: none, or labels of the first columns or rows.
        pad: pixels between the cells.

    Raises:
        ValueError: there is no image, or there are more labels than columns or rows.
    """
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("A contact sheet needs at least one image.")
    columns = max(len(row) for row in rows)
    if len(column_labels) > columns or len(row_labels) > len(rows):
        raise ValueError(
            f"There are {len(column_labels)} column labels for {columns} columns and {len(row_labels)} row labels for "
            f"{len(rows)} rows; give at most one each."
        )
    width, height = max(image.width for image in images), max(image.height for image in images)
    head, caption = (LINE if column_labels else 0), (LINE if row_labels else 0)
    row_height = caption + height + pad
    sheet = Image.new("RGB", (pad + columns * (width + pad), pad + head + len(rows) * row_height), "white")
    for column, label in enumerate(column_labels):
        write(sheet, (pad + column * (width + pad), 1), label, width)
    for index, row in enumerate(rows):
        top = pad + head + index * row_height
        if index < len(row_labels):
            write(sheet, (pad, top), row_labels[index], sheet.width - 2 * pad)
        for column, image in enumerate(row):
            left = pad + column * (width + pad) + (width - image.width) // 2
            sheet.paste(image.convert("RGB"), (left, top + caption + (height - image.height) // 2))
    return sheet


def captioned(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """Put lines of text below a copy of ``image``, on white; lines that are too long end in "..."."""
    result = Image.new("RGB", (image.width, image.height + LINE * len(lines)), "white")
    result.paste(image.convert("RGB"))
    for index, text in enumerate(lines):
        write(result, (2, image.height + LINE * index + 1), text, image.width - 4)
    return result


def render_layout(layout: Layout, image: Image.Image | None = None) -> Image.Image:
    """Render the outlines and phrases of a layout's regions on a copy of ``image``, or on white with a frame.

    Phrases do not cover each other; a phrase that has no room is left out.
    """
    height, width = layout.size or (512, 512)
    result = Image.new("RGB", (width, height), "white") if image is None else image.convert("RGB")
    if image is None:
        ImageDraw.Draw(result).rectangle((0, 0, width - 1, height - 1), outline="lightgray")
    masks = layout.masks((result.height, result.width), "area")
    taken: list[Box] = []
    for index, mask in enumerate(masks):
        result = outline(result, mask / mask.max(), REGION_COLORS[index % len(REGION_COLORS)])
    for index, (region, mask) in enumerate(zip(layout.regions, masks, strict=True)):  # on top of all outlines
        rows, columns = (mask[0] >= mask.max() / 2).nonzero().unbind(dim=1)
        corner = (int(columns[rows == rows.min()].min()) + 3, int(rows.min()) + 2)
        write_beside(result, corner, region.phrase or "-", REGION_COLORS[index % len(REGION_COLORS)], taken)
    return result


def region_sheet(
    rows: Sequence[Sequence[Image.Image]],
    layouts: Sequence[Layout],
    columns: Sequence[str],
    captions: Sequence[str],
    read: Callable[[Image.Image, Layout], Sequence[str]] | None = None,
) -> Image.Image:
    """Compose a contact sheet of images with the regions of their layouts.

    Args:
        rows: the images of each row.
        layouts: the layout of each row.
        columns, captions: labels of the columns and of the rows.
        read: returns lines of text to put below an image; None: no text.
    """
    cells: list[list[Image.Image]] = []
    for row, layout in zip(rows, layouts, strict=True):
        cells.append([])
        for image in row:
            factor = -(-SMALLEST // image.width)
            cell = render_layout(layout, image.resize((factor * image.width, factor * image.height)))
            cells[-1].append(captioned(cell, read(image, layout)) if read else cell)
    return grid(cells, columns, captions)


def overlay_heat(image: Image.Image, heat: Tensor) -> Image.Image:
    """Render a heat map over ``image``: ``heat`` (h,w), resized to the image, colours from 0 to its maximum."""
    scaled = (heat / heat.max() * 255).clamp(0, 255).byte().numpy()
    scaled = cv2.resize(scaled, image.size, interpolation=cv2.INTER_CUBIC)
    mixed = 0.4 * np.asarray(image.convert("RGB"), dtype=np.float32) + 0.6 * heat_colors(scaled)
    return Image.fromarray(mixed.round().astype(np.uint8))


def overlay_edges(
    image: Image.Image, matched: np.ndarray, missed: np.ndarray, invented: np.ndarray, mask: np.ndarray | None = None
) -> Image.Image:
    """Render edges over a darkened copy of ``image``, in the colours of ``EDGE_COLORS``.

    Args:
        image: of any size; enlarged by a whole factor to at least ``SMALLEST`` pixels.
        matched, missed, invented: bool (H,W), of the image's size. Where they overlap, matched edges are on top.
        mask: (H,W); where given, what lies outside it is darkened twice.
    """
    shade = np.full((image.height, image.width, 1), 0.45, np.float32)
    if mask is not None:
        shade[np.asarray(mask) < 0.5] = 0.2
    dark = np.asarray(image.convert("RGB"), dtype=np.float32) * shade
    factor = -(-SMALLEST // image.width)
    result = Image.fromarray(dark.round().astype(np.uint8)).resize((factor * image.width, factor * image.height))
    for name, edges in (("missed", missed), ("invented", invented), ("matched", matched)):
        area = Image.fromarray(np.asarray(edges, dtype=np.uint8) * 255).resize(result.size, Image.Resampling.NEAREST)
        result.paste(EDGE_COLORS[name], (0, 0, *result.size), area)
    return result


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Map values uint8 (H,W) to colours from black over red to yellow: uint8 (H,W,3), RGB."""
    return cv2.applyColorMap(values, cv2.COLORMAP_INFERNO)[..., ::-1]


def fitted(text: str, width: int) -> str:
    """Shorten ``text`` to one line of at most ``width`` pixels, which ends in "..." where text was removed."""
    text = one_line(text)
    if len(text) <= MOST and _length(text) <= width:
        return text
    # Bisect for the longest prefix that fits: measuring text is slow.
    fits = bisect_right(range(1, len(text)), width, key=lambda letters: ceil(_length(text[:letters] + "...")))
    return text[:fits] + "..."


def write(image: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """Write ``text`` in black into ``image`` at ``place`` (x, y), shortened to ``width`` pixels."""
    ImageDraw.Draw(image).text(place, fitted(text, width), fill="black", font=_font())


def write_beside(image: Image.Image, wanted: tuple[int, int], text: str, color: str, taken: list[Box]) -> None:
    """Write a label on white at ``wanted`` (x, y), or at the nearest place inside the image that is free.

    taken: boxes xyxy of other labels, in pixels; the box of this one is added. Without a free place, the label is left
    out.
    """
    text = fitted(text, image.width - 2)
    pen, font = ImageDraw.Draw(image), _font()
    _, _, right, bottom = (round(side) for side in pen.textbbox((0, 0), text, font=font))
    room = (image.width - right - 1, image.height - bottom - 1)
    place = _free_place(wanted, (right, bottom), taken, room)
    if place is None:
        return
    pen.rectangle(pen.textbbox(place, text, font=font), fill="white")
    pen.text(place, text, fill=color, font=font)
    taken.append((place[0], place[1], place[0] + right, place[1] + bottom))


def _free_place(
    wanted: tuple[int, int], size: tuple[int, int], taken: Sequence[Box], room: tuple[int, int]
) -> tuple[int, int] | None:
    """Return the nearest (x, y) to ``wanted`` where a box of ``size`` (w, h) overlaps none of ``taken``, or None.

    room: the largest x and y. Only places at ``wanted`` and at the edges of the image and of taken boxes are tried: if
    there is a free place, one of them is free.
    """
    corner = tuple(max(0, min(value, most)) for value, most in zip(wanted, room, strict=True))
    boxes = np.array(taken, dtype=int).reshape(-1, 4)
    few = boxes[:0] if len(taken) > MOST_MOVED else boxes
    axes = []
    for axis in (0, 1):
        sides = [corner[axis], 0, room[axis], *(few[:, axis + 2] + 1), *(few[:, axis] - size[axis] - 1)]
        axes.append(np.unique([side for side in sides if 0 <= side <= max(0, room[axis])]))
    places = np.array(np.meshgrid(*axes)).reshape(2, -1).T  # (n,2)
    places = places[np.argsort(np.abs(places - corner).sum(axis=1), kind="stable")]
    (x,), (y,) = np.split(places.T[..., None], 2)  # (n,1) each, against (m,)
    apart = (x > boxes[:, 2]) | (x + size[0] < boxes[:, 0]) | (y > boxes[:, 3]) | (y + size[1] < boxes[:, 1])
    free = apart.all(axis=1).nonzero()[0]
    return None if not len(free) else (int(places[free[0], 0]), int(places[free[0], 1]))


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default()


def _length(text: str) -> float:
    return _font().getlength(text)
