"""Text written into images. Captions are anybody's: whatever they hold, a label is one line that fits its place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LINE = 14  # px from one line to the next
MOST = 2000  # letters that are measured; no sheet is wide enough to show more
MOST_MOVED = 40  # labels in one image for which another place is looked for

Box = tuple[int, int, int, int]


def one_line(text: str) -> str:
    """The beginning of ``text`` on one line: line breaks, tabs, control characters, half surrogate pairs and whatever
    else has no shape of its own become spaces."""
    text = text.lstrip()[: MOST + 1]
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def brief(text: str, most: int = 120) -> str:
    """The beginning of ``text`` on one line, of at most ``most`` letters: as part of a message."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def fitted(text: str, width: int) -> str:
    """``text`` on one line of at most ``width`` pixels, ending in "..." where it was cut."""
    text = one_line(text)
    if len(text) <= MOST and _length(text) <= width:
        return text
    # the number of letters after which it no longer fits; the text is measured a dozen times, not once per letter
    fits = bisect_right(range(1, len(text)), width, key=lambda letters: ceil(_length(text[:letters] + "...")))
    return text[:fits] + "..."


def write(image: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """Write ``text`` in black into ``image``, shortened to ``width`` pixels."""
    ImageDraw.Draw(image).text(place, fitted(text, width), fill="black", font=_font())


def write_beside(image: Image.Image, wanted: tuple[int, int], text: str, color: str, taken: list[Box]) -> None:
    """Write a label on white at ``wanted`` (x, y) or as near to it as it lies inside the image and on none of the
    ``taken`` boxes, to which its own is added. Where there is no such place, it is left out."""
    text = fitted(text, image.width - 2)
    pen, font = ImageDraw.Draw(image), _font()
    _, _, right, bottom = (round(side) for side in pen.textbbox((0, 0), text, font=font))
    room = (image.width - right - 1, image.height - bottom - 1)
    place = _free_place(wanted, (right, bottom), taken, room)
    if place is None:
        return
    box = pen.textbbox(place, text, font=font)
    pen.rectangle(box, fill="white")
    pen.text(place, text, fill=color, font=font)
    taken.append((place[0], place[1], place[0] + right, place[1] + bottom))


def _free_place(
    wanted: tuple[int, int], size: tuple[int, int], taken: Sequence[Box], room: tuple[int, int]
) -> tuple[int, int] | None:
    """The nearest (x, y) to ``wanted`` where a box of ``size`` (w, h) meets none of ``taken``; None = nowhere.

    room: the largest x and y. Tried are the edges of the image and of what is taken: if there is room, it is there.
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
