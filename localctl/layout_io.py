"""Read and write layouts: JSON with mask files, colour-coded images, COCO boxes, DenseDiffusion's benchmark."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.coco import coco_box, coco_id, find_category, is_crowd, plain_name
from localctl.files import first_line, read_object, write_json
from localctl.images import load_image
from localctl.layout import Layout, Region
from localctl.layout_checks import Box, check_count
from localctl.masks import load_mask, mask_to_pil
from localctl.sizes import MAX_SIDE, near_side, shown

Color = tuple[int, int, int]
_LAYOUT_KEYS = ("prompt", "height", "width", "overlap", "regions")
_REGION_KEYS = tuple(field.name for field in fields(Region))
_MIN_DISTANCE = 40.0  # colours closer than this (Euclidean, 0-255) are one colour, with compression noise or soft edges


def save_layout(layout: Layout, path: str | Path) -> Path:
    """Write ``path`` (JSON) and one PNG per mask in its folder, named after it; return the path.

    Values equal to their defaults are left out. Masks are saved with 8 bits.
    """
    path = Path(path)
    regions = []
    for index, region in enumerate(layout.regions):
        item: dict[str, Any] = {}
        for field in fields(Region):
            value = getattr(region, field.name)
            if field.name == "mask" and value is not None:
                value = f"{path.stem}_mask_{index}.png"
                mask_to_pil(region.mask).save(path.with_name(value))
            if field.name == "box" and value is not None:
                value = [list(box) for box in value]
                value = value[0] if len(value) == 1 else value
            if value != field.default:
                item[field.name] = value
        regions.append(item)
    content = {"prompt": layout.prompt, "height": layout.height, "width": layout.width, "overlap": layout.overlap}
    content = {name: value for name, value in content.items() if value is not None}
    write_json(path, {**content, "regions": regions}, indent=1, ensure_ascii=False)
    return path


def load_layout(path: str | Path) -> Layout:
    """Read a layout that :func:`save_layout` wrote, or one written by hand; masks are in its folder or below.

    Without a prompt, the phrases are joined to one. ValueError for a missing or damaged file, an unknown key, a value
    of the wrong type, or anything that :class:`localctl.layout.Layout` refuses.
    """
    path = Path(path)
    content = read_object(path, "The file")
    return from_content(content, lambda name, where: load_mask(file_inside(path.parent, name, where)), str(path))


def from_content(content: Mapping[str, Any], open_mask: Callable[[str, str], Any], source: str) -> Layout:
    """Read a layout from the content of a JSON file.

    ``open_mask``: (name of a mask's file, the region's place for messages) -> the mask. ``source``: what messages call
    the file. ValueError as for :func:`load_layout`.
    """
    _check_keys(content, _LAYOUT_KEYS, f"The layout {source}")
    items = content.get("regions", [])
    if not isinstance(items, list):
        raise ValueError(f"'regions' in {source} must be a list of regions, not {shown(items)}.")
    check_count(len(items), f"The layout {source}")
    regions = [_region(item, open_mask, source, index) for index, item in enumerate(items)]
    for name in ("height", "width"):
        if not (content.get(name) is None or type(content[name]) is int):
            raise ValueError(f"'{name}' in {source} must be a number of pixels, not {shown(content[name])}.")
    size = content.get("height"), content.get("width")
    try:
        return Layout.from_segments(regions, content.get("prompt"), *size, content.get("overlap", "share"))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def from_colors(
    image: str | Path | Image.Image,
    phrases: Mapping[Color | str, str],
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
) -> Layout:
    """Make a layout from an image with one colour per region.

    Args:
        image: every pixel is assigned to the nearest colour of the table, so smooth edges and compression noise are
            allowed.
        phrases: maps a colour, (r, g, b) or "#rrggbb", to a phrase; "" for a part without words.
        prompt: without one, the phrases are joined.
        size: (height, width) of the layout in pixels; by default the image's, rounded to multiples of 8.

    Raises:
        ValueError: an invalid colour, one that does not occur in the image, or two that are too similar.
    """
    check_count(len(phrases), "The table of colours")
    colors = [_color(color) for color in phrases]
    array = _rgb(image)  # (H,W,3)
    masks = nearest_color(array, colors)
    segments = []
    for color, phrase, mask in zip(phrases, phrases.values(), masks, strict=True):
        near = np.abs(array[mask.numpy()[0] > 0] - np.array(_color(color))).max(axis=-1, initial=0)
        if not mask.any() or near.min() > _MIN_DISTANCE:
            raise ValueError(
                f"The colour {color} of the phrase {phrase!r} does not occur in the image; check the table of colours."
            )
        segments.append(Region(phrase, mask=mask))
    height, width = size or (near_side(array.shape[0]), near_side(array.shape[1]))
    return Layout.from_segments(segments, prompt, height, width)


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


def from_dense_diffusion(folder: str | Path, index: int | str, size: tuple[int, int] | None = None) -> Layout:
    """Read one scene of DenseDiffusion's benchmark: ``valset.json`` (its pickle as JSON) and ``<index>.png``.

    As published, the colours of the image are ordered by area, with black or white first, and the descriptions belong
    to them in this order; an empty description is a part without words.

    ``size``: (height, width) in pixels; by default the image's. ValueError for files that are missing or in another
    format.
    """
    folder = Path(folder)
    content = read_object(folder / "valset.json", "The file")
    scene = content.get(str(index))
    if not isinstance(scene, dict) or not {"textual_condition", "segment_descriptions"} <= set(scene):
        raise ValueError(
            f"There is no scene {index} in {folder / 'valset.json'}; choose one of the {len(content)} that it has."
        )
    texts = scene["segment_descriptions"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The descriptions of scene {index} must be a list of texts, not {shown(texts)}.")
    check_count(len(texts), f"Scene {index} in {folder / 'valset.json'}")
    array = _rgb(folder / f"{index}.png")
    colors = main_colors(array, len(texts))
    if len(colors) < len(texts):
        raise ValueError(
            f"{folder / f'{index}.png'} has {len(colors)} colours for {len(texts)} descriptions; it needs one for each."
        )
    for color in ((0, 0, 0), (255, 255, 255)):
        close = [item for item in colors if float(np.linalg.norm(np.subtract(item, color))) < _MIN_DISTANCE]
        if close:
            colors.remove(close[0])
            colors.insert(0, close[0])
    segments = [Region(text, mask=mask) for text, mask in zip(texts, nearest_color(array, colors), strict=True)]
    height, width = size or array.shape[:2]
    return Layout.from_segments(segments, scene["textual_condition"], height, width)


def _region(item: Any, open_mask: Callable[[str, str], Any], source: str, index: int) -> Region:
    where = f"Region {index} of {source}"
    _check_keys(item, _REGION_KEYS, where)
    values = dict(item)
    if values.get("mask") is not None:
        if not isinstance(values["mask"], str):
            mask = shown(values["mask"])
            raise ValueError(f"'mask' of region {index} of {source} must be the name of an image file, not {mask}.")
        values["mask"] = open_mask(values["mask"], where)
    try:
        return Region(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def file_inside(folder: Path, name: str, where: str) -> Path:
    """Return the path of a mask file. A layout may be untrusted, so files outside its folder are refused: ValueError,
    which begins with ``where``."""
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or Path(inside).parts[:1] == ("..",) or Path(inside).drive:
        raise ValueError(
            f"{where} names the mask {shown(name)} outside the layout's folder; copy the mask into that folder."
        )
    try:
        (folder / inside).stat()
    except FileNotFoundError:
        pass  # load_mask raises the error
    except (OSError, ValueError) as error:  # a name that is too long, or with a null byte
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{where}: the mask {shown(name)} cannot be read ({reason}).") from error
    return folder / inside


def _check_keys(content: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be an object with named fields, not {shown(content)}.")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(known)}."
            raise ValueError(f"{where} has an unknown field {shown(key)}; {hint}")


def _rgb(image: str | Path | Image.Image) -> np.ndarray:
    """Read an image as (H,W,3) float32 in [0, 255]."""
    loaded = image if isinstance(image, Image.Image) else load_image(image)
    return np.asarray(loaded.convert("RGB"), dtype=np.float32)


def _color(color: Color | str) -> Color:
    try:
        values = bytes.fromhex(color.lstrip("#")) if isinstance(color, str) else bytes(color)
    except (ValueError, TypeError):
        values = b""
    if len(values) != 3:
        raise ValueError(f"{color!r} is not a colour; give #rrggbb or three whole numbers from 0 to 255.")
    return values[0], values[1], values[2]


def nearest_color(array: np.ndarray, colors: Sequence[Color]) -> list[Tensor]:
    """Return one mask (1,H,W) per colour: the pixels nearer to it than to any other. ValueError for similar colours."""
    for index, color in enumerate(colors):
        for other in colors[:index]:
            if np.linalg.norm(np.subtract(color, other)) < 3:
                raise ValueError(
                    f"The colours {other} and {color} are too similar to tell apart; choose clearly different ones."
                )
    distance = np.stack([((array - np.array(color, np.float32)) ** 2).sum(axis=-1) for color in colors])
    nearest = distance.argmin(axis=0)  # (H,W)
    return [torch.from_numpy((nearest == index).astype(np.float32))[None] for index in range(len(colors))]


def main_colors(array: np.ndarray, count: int) -> list[Color]:
    """Return the ``count`` most frequent clearly different colours, the most frequent first."""
    packed = array.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])  # one integer per pixel sorts much faster
    values, counts = np.unique(packed, return_counts=True)
    chosen: list[Color] = []
    for value in values[np.argsort(-counts, kind="stable")].tolist():
        color = (value >> 16, value >> 8 & 255, value & 255)
        if all(np.linalg.norm(np.subtract(color, other)) >= _MIN_DISTANCE for other in chosen):
            chosen.append(color)
        if len(chosen) == count:
            break
    return chosen
