"""Tolerant reading of MSCOCO's annotations: ids as text or number, boxes without area, names with underscores."""

from __future__ import annotations

import math
from typing import Any

from localctl.layout_checks import Box
from localctl.phrases import find_phrase

_PAIRS = (
    "person-people man-men woman-women child-children mouse-mice goose-geese foot-feet tooth-teeth knife-knives "
    "leaf-leaves loaf-loaves shelf-shelves scarf-scarves wolf-wolves calf-calves half-halves"
)
_PLURALS = dict(pair.split("-") for pair in _PAIRS.split())
_SINGULARS = {plural: one for one, plural in _PLURALS.items()}


def coco_id(value: Any) -> int | str:
    """Normalise an id of an image or category, written as a number or as text: 7, "7" and 7.0 are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return int(text) if text.isdecimal() and len(text) < 20 else text


def coco_box(values: Any, width: float, height: float) -> Box | None:
    """Convert COCO's (x, y, width, height) in pixels to xyxy in [0, 1], clipped to the image.

    ``width``, ``height``: of the image in pixels. None for a box that is missing, not finite or without an area in the
    image. ValueError for anything but four numbers.
    """
    if values is None or (isinstance(values, (list, tuple)) and not values):
        return None
    try:
        x, y, w, h = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"A COCO box must be (x, y, width, height), not {str(values)[:80]}.") from None
    if not all(map(math.isfinite, (x, y, w, h))) or not (width > 0 and height > 0):
        return None
    corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in corners)
    return (left, top, right, bottom) if left < right and top < bottom else None


def is_crowd(annotation: Any) -> bool:
    """Return whether an annotation is a crowd; some tools write the flag as text."""
    return str(annotation.get("iscrowd") or 0).lower() not in ("0", "0.0", "false")


def plain_name(name: str) -> str:
    """Return the name of a category as in a sentence, with spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


def find_category(prompt: str, name: str) -> list[tuple[str, int]]:
    """Find the occurrences of a category in ``prompt``, in reading order.

    Returns:
        For each, the words used there and which occurrence of these words it is, from 0. Underscores and hyphens match
        spaces, and singulars match plurals ("two persons", "people") and vice versa.
    """
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for form in _name_forms(name):
        for occurrence, span in enumerate(find_phrase(prompt, form)):
            found.setdefault(span, (form, occurrence))
    ordered = sorted(found)
    outer = [span for span in ordered if not any(o != span and o[0] <= span[0] and span[1] <= o[1] for o in ordered)]
    return [found[span] for span in outer]


def _name_forms(name: str) -> list[str]:
    """List the forms of a category's name that a prompt may use, the name itself first."""
    plain = plain_name(name)
    forms = [name.strip(), plain, plain.replace("-", " "), plain.replace(" ", "-")]
    for form in tuple(forms[1:]):
        start, space, last = form.rpartition(" ")
        forms += [start + space + other for other in _plurals_and_singulars(last)]
    return [form for form in dict.fromkeys(forms) if form]


def _plurals_and_singulars(word: str) -> list[str]:
    """List the possible plurals and singulars of a word."""
    lower = word.lower()
    several = [lower + "s", lower + "es", lower[:-1] + "ies" if lower.endswith("y") else "", _PLURALS.get(lower, "")]
    single = [_SINGULARS.get(lower, "")]
    if lower.endswith("s") and not lower.endswith("ss") and len(lower) > 3:
        single += [
            lower[:-1],
            lower[:-2] if lower.endswith("es") else "",
            lower[:-3] + "y" if lower.endswith("ies") else "",
        ]
    return [form for form in (*several, *single) if form]
