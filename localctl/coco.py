"""Layouts from MSCOCO's annotations, read tolerantly: ids as text or number, boxes without area, names with
underscores."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from localctl.files import read_object
from localctl.layout import Layout, Region
from localctl.layout_checks import Box
from localctl.phrases import find_phrase
from localctl.sizes import MAX_SIDE, near_side, shown

_PAIRS = (
    "person-people man-men woman-women child-children mouse-mice goose-geese foot-feet tooth-teeth knife-knives "
    "leaf-leaves loaf-loaves shelf-shelves scarf-scarves wolf-wolves calf-calves half-halves"
)
_PLURALS = dict(pair.split("-") for pair in _PAIRS.split())
_SINGULARS = {plural: one for one, plural in _PLURALS.items()}


def from_coco(
    annotations: str | Path | Mapping[str, Any],
    image_id: int | str,
    prompt: str | None = None,
    categories: Sequence[str] | None = None,
) -> Layout:
    """Make a layout from the boxes of one image in COCO's format (``images``, ``annotations``, ``categories``).

    The n-th box of a category belongs to the category's n-th occurrence in the prompt; the last occurrence gets all
    further boxes. Underscores in names are read as spaces, and the prompt may use the plural ("two persons"). Without a
    prompt, the names of all boxes are joined. The size is the image's, rounded to multiples of 8.

    Boxes are clipped to the image. Crowds are left out silently; boxes without an area in the image, annotations
    without a box and categories that the file does not list are left out with a warning.

    Args:
        annotations: a file or its content.
        image_id: as a number or as text.
        prompt: of the layout; its phrases are the categories' names.
        categories: the names to use; None = all.

    Raises:
        ValueError: a file that is not COCO, an unknown image or category, no box left, or as for the layout.
    """
    content = read_object(Path(annotations), "The file") if isinstance(annotations, (str, Path)) else annotations
    wanted = coco_id(image_id)
    try:
        names = {coco_id(item["id"]): str(item["name"]) for item in content["categories"]}
        image = next((item for item in content["images"] if coco_id(item["id"]) == wanted), None)
        found = [
            (names.get(coco_id(item["category_id"]), ""), item.get("bbox"))
            for item in content["annotations"]
            if coco_id(item["image_id"]) == wanted and not is_crowd(item)
        ]
        if image is None:
            raise ValueError(f"There is no image {image_id} in the COCO annotations; check the id.")
        sides = image.get("height"), image.get("width")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"These are not COCO annotations of boxes (problem: {error}); give an instances file."
        ) from error
    height, width = (_coco_side(side, sides, image_id) for side in sides)
    used = _used_boxes(found, (height, width), _chosen_names(categories, names.values()), image_id)
    size = near_side(height), near_side(width)
    if prompt is None:
        return Layout.from_segments([Region(plain_name(name), box) for name, box in used], None, *size)
    boxes: dict[str, list[Any]] = {}
    for name, box in used:
        boxes.setdefault(name, []).append(box)
    regions = []
    for name, several in boxes.items():
        # A name that the prompt lacks is kept, so that the layout refuses it.
        found_places = (find_category(prompt, name) or [(plain_name(name), 0)])[: len(several)]
        for place, (phrase, occurrence) in enumerate(found_places):
            own = several[place:] if place == len(found_places) - 1 else several[place : place + 1]
            regions.append(Region(phrase, own, occurrence=occurrence))
    return Layout(prompt, *size, tuple(regions))


def _used_boxes(
    found: Sequence[tuple[str, Any]], size: tuple[int, int], names: Collection[str], image_id: Any
) -> list[tuple[str, Box]]:
    """Return (name, box) of each usable annotation, boxes xyxy in [0, 1]; warn how many are left out."""
    placed = [(name, coco_box(box, size[1], size[0])) for name, box in found if name in names or not name]
    used = [(name, box) for name, box in placed if box is not None and name]
    lost = len(placed) - len(used)
    if placed and not used:
        raise ValueError(
            f"None of the {lost} boxes of the image {image_id} has both an area in the image and a category that the "
            "file lists; check the annotations."
        )
    if lost:
        warnings.warn(
            f"{lost} of {len(placed)} boxes of the image {image_id} are left out: they have no area in the image, or "
            "no category that the file lists.",
            stacklevel=3,
        )
    return used


def _coco_side(side: Any, sides: Any, image_id: Any) -> int:
    """Read a side of the image in pixels. ValueError unless it is from 1 to ``MAX_SIDE``."""
    try:
        pixels = int(float(side))
    except (TypeError, ValueError, OverflowError):
        pixels = 0
    if not 0 < pixels <= MAX_SIDE:
        raise ValueError(
            f"The image {image_id} of the COCO annotations has (height, width) {shown(sides)}; each must be from 1 to "
            f"{MAX_SIDE} pixels."
        )
    return pixels


def _chosen_names(categories: Sequence[str] | None, names: Collection[str]) -> Collection[str]:
    """Return the names that match ``categories``, in any case and with or without underscores; None = all.

    ValueError for a category without a match.
    """
    if categories is None:
        return names
    known = {plain_name(name).lower(): name for name in names}
    chosen = []
    for category in [categories] if isinstance(categories, str) else categories:
        name = known.get(plain_name(str(category)).lower())
        if name is None:
            near = difflib.get_close_matches(str(category), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"check it against the {len(names)} that it has."
            raise ValueError(f"There is no category {category!r} in the COCO annotations; {hint}")
        chosen.append(name)
    return chosen


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
