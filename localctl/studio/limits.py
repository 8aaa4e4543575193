"""What the page may ask for. Every handler reads every field by these functions: a page is whatever a program sends.

Each takes the name of the field and its value, and returns the value or raises a ValueError in one sentence.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localctl.images import open_gray
from localctl.layout_checks import check_text
from localctl.sizes import SIZE_MULTIPLE, near_side, shown
from localctl.studio.theme import COLORS

MAX_PROMPT, MAX_PHRASE = 1000, 300  # characters
MAX_REGIONS = 16
MIN_SIDE, MAX_SIDE, MAX_AREA = 64, 2048, 2048 * 2048  # pixels
MAX_STEPS, MAX_IMAGES = 150, 8
MAX_SEED = 2**63 - 1
MAX_MASK = 3_000_000  # characters of a mask as text
_PNG = "data:image/png;base64,"
_IDS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")


def text(name: str, value: Any, most: int = MAX_PROMPT) -> str:
    """Read a text of at most ``most`` characters; None is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {shown(value)}.")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} characters, more than {most}; shorten it.")
    check_text(name, value)
    if "\0" in value:
        raise ValueError(f"{name} holds a null character; leave it out.")
    return value


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Read a whole number from ``low`` to ``high``; 3.0 is one, as JSON has no other way to say it."""
    read = _finite(name, value)
    if read != int(read):
        raise ValueError(f"{name} must be a whole number, not {shown(value)}.")
    return int(_within(name, value if isinstance(value, int) else int(read), low, high))


def seed(value: Any) -> int:
    """Read the seed of the first image, as text: a browser rounds numbers over 2**53."""
    digits = value.strip() if isinstance(value, str) else value
    if isinstance(digits, str) and not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise ValueError(f"The seed must be a whole number from 0, in digits, not {shown(value)}.")
    return whole("The seed", int(digits) if isinstance(digits, str) else digits, 0, MAX_SEED - MAX_IMAGES)


def number(name: str, value: Any, low: float, high: float) -> float:
    """Read a finite number from ``low`` to ``high``."""
    return float(_within(name, _finite(name, value), low, high))


def window(title: str, of: str, start: Any, end: Any) -> tuple[float, float]:
    """Read when something begins and ends, as shares of the steps. title, of: its name as a sentence begins with it,
    and after "of"."""
    first, last = number(f"The start of {of}", start, 0, 1), number(f"The end of {of}", end, 0, 1)
    if first >= last:
        raise ValueError(f"{title} needs a start before its end, not {first:g} and {last:g}.")
    return first, last


def optional_number(name: str, value: Any, low: float, high: float) -> float | None:
    """Read a number, also as text; None where nothing is given."""
    if isinstance(value, str):
        try:
            value = float(text(name, value, 40)) if value.strip() else None
        except ValueError:
            raise ValueError(f"{name} must be a number or empty, not {shown(value)}.") from None
    return None if value is None else number(name, value, low, high)


def flag(name: str, value: Any) -> bool:
    """Read true or false; None is false."""
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {shown(value)}.")
    return value


def choice(name: str, value: Any, known: Collection[str]) -> str:
    """Read one of the texts in ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {shown(value)}.")
    return value


def choices(name: str, value: Any, known: Collection[str], most: int = 32) -> list[str]:
    """Read several of the texts in ``known``, each once; None is none of them."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or len(value) > most or len(set(map(str, value))) < len(value):
        raise ValueError(f"{name} must be a list of different choices, not {shown(value)}.")
    return [choice(name, item, known) for item in value]


def numbers(name: str, value: Any, low: float, high: float, most: int) -> list[float]:
    """Read numbers separated by commas or spaces, as "0, 0.5, 1": at least one, at most ``most``, each once."""
    parts = text(name, value, 200).replace(",", " ").replace(";", " ").split()
    try:
        read = [number(name, float(part), low, high) for part in parts]
    except ValueError as error:
        if "could not convert" in str(error):
            raise ValueError(f"{name} must be numbers separated by commas, not {shown(value)}.") from None
        raise
    if not 1 <= len(read) <= most or len(set(read)) < len(read):
        raise ValueError(f"{name} must be 1 to {most} different numbers, not {shown(value)}.")
    return read


def side(name: str, value: Any) -> int:
    """Read a side of an image in pixels, a multiple of 8."""
    read = whole(name, value, MIN_SIDE, MAX_SIDE)
    if read % SIZE_MULTIPLE:
        raise ValueError(f"{name} {read} is not a multiple of {SIZE_MULTIPLE}; use {near_side(read)}, for example.")
    return read


def optional_side(name: str, value: Any) -> int | None:
    """Read a side, also as text; None where nothing is given."""
    read = optional_number(name, value, MIN_SIDE, MAX_SIDE)
    return None if read is None else side(name, read)


def upload(name: str, value: Any, most: int) -> bytes:
    """Read an uploaded file as the component for files gives it, of at most ``most`` bytes."""
    if not isinstance(value, bytes):
        raise ValueError(f"{name} is missing; upload a file.")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value):,} bytes, more than {most:,}.")
    return value


@dataclass(frozen=True)
class SceneRegion:
    """A region as the canvas sends it, checked. mask: (H,W) float32 in [0, 1]. Neither box nor mask: nowhere yet."""

    id: str
    color: int
    phrase: str
    occurrence: int
    box: tuple[float, float, float, float] | None
    mask: np.ndarray | None
    strength: float
    outside_strength: float
    start: float
    end: float
    prompt: str
    negative_prompt: str

    @property
    def is_placed(self) -> bool:
        """Whether it has a place in the image."""
        return self.box is not None or self.mask is not None


@dataclass(frozen=True)
class Scene:
    """What the canvas shows: its size in pixels and its regions."""

    width: int
    height: int
    regions: tuple[SceneRegion, ...]


def scene(value: Any) -> Scene:
    """Read the value of a canvas."""
    if not isinstance(value, Mapping):
        raise ValueError(f"The canvas must be an object with regions, not {shown(value)}.")
    width, height = side("The width", value.get("width")), side("The height", value.get("height"))
    if width * height > MAX_AREA:
        raise ValueError(f"The size {width}x{height} is over {MAX_AREA:,} pixels; choose a smaller one.")
    regions = value.get("regions", [])
    if not isinstance(regions, Sequence) or isinstance(regions, str):
        raise ValueError(f"The regions must be a list, not {shown(regions)}.")
    if len(regions) > MAX_REGIONS:
        raise ValueError(f"There are {len(regions)} regions, more than {MAX_REGIONS}; delete some.")
    read = tuple(_region(item, index) for index, item in enumerate(regions, start=1))
    if len({region.id for region in read}) < len(read):
        raise ValueError("Two regions have the same id; reload the page.")
    return Scene(width, height, read)


def _region(value: Any, index: int) -> SceneRegion:
    name = f"of region {index}"
    if not isinstance(value, Mapping):
        raise ValueError(f"Region {index} must be an object, not {shown(value)}.")
    own = value.get("id")
    if not isinstance(own, str) or not 0 < len(own) <= 40 or not _IDS.issuperset(own):
        raise ValueError(f"The id {name} must be letters and digits, not {shown(own)}.")
    box, mask = value.get("box"), value.get("mask")
    if box is not None and mask is not None:
        raise ValueError(f"Region {index} has both a box and a mask; give one of them.")
    start, end = window(f"Region {index}", f"region {index}", value.get("start", 0), value.get("end", 1))
    return SceneRegion(
        id=own,
        color=whole(f"The colour {name}", value.get("color", 0), 0, len(COLORS) - 1),
        phrase=text(f"The phrase {name}", value.get("phrase"), MAX_PHRASE).strip(),
        occurrence=whole(f"The occurrence {name}", value.get("occurrence", 0), 0, 100),
        box=None if box is None else _box(name, box),
        mask=None if mask is None else _mask(name, mask),
        strength=number(f"The strength {name}", value.get("strength", 1), -10, 10),
        outside_strength=number(f"The outside strength {name}", value.get("outside_strength", 1), -10, 10),
        start=start,
        end=end,
        prompt=text(f"The own prompt {name}", value.get("prompt"), MAX_PHRASE).strip(),
        negative_prompt=text(f"The negative prompt {name}", value.get("negative_prompt"), MAX_PHRASE).strip(),
    )


def _box(name: str, value: Any) -> tuple[float, float, float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        raise ValueError(f"The box {name} must be four numbers, not {shown(value)}.")
    left, top, right, bottom = (number(f"The box {name}", edge, 0, 1) for edge in value)
    if not (left < right and top < bottom):
        raise ValueError(f"The box {name} is empty; drag a larger one.")
    return left, top, right, bottom


def _mask(name: str, value: Any) -> np.ndarray:
    """Read a PNG as data URL, white = inside."""
    what = f"The mask {name}"
    if not isinstance(value, str) or not value.startswith(_PNG):
        raise ValueError(f"{what} must be a PNG as text, not {shown(value)}.")
    if len(value) > MAX_MASK:
        raise ValueError(f"{what} has {len(value):,} characters, more than {MAX_MASK:,}.")
    try:
        content = base64.b64decode(value[len(_PNG) :], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{what} is not base64; paint it again.") from None
    if not content.startswith(b"\x89PNG"):
        raise ValueError(f"{what} is not a PNG; paint it again.")
    mask = open_gray(content, what)
    if not mask.any():
        raise ValueError(f"{what} is empty; paint it or delete the region.")
    return mask


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, not {shown(value)}.")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"{name} must be a finite number, not {shown(value)}.")
    return value


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        bounds = " to ".join(str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in (low, high))
        raise ValueError(f"{name} must be from {bounds}, not {shown(value)}.")
    return value
