"""Layouts in and out: JSON with masks beside it, colour-coded images, COCO boxes, DenseDiffusion's benchmark."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.coco import coco_box, coco_id, is_crowd, places, spoken
from localctl.files import first_line, read_object, write_json
from localctl.images import load_image
from localctl.layout import Layout, Region
from localctl.layout_checks import Box, check_count
from localctl.masks import load_mask, mask_to_pil
from localctl.sizes import MAX_SIDE, near_side, shown

Color = tuple[int, int, int]
_LAYOUT_KEYS = ("prompt", "height", "width", "overlap", "regions")
_REGION_KEYS = tuple(field.name for field in fields(Region))
_MIN_DISTANCE = 40.0  # two colours closer than this (Euclidean, 0-255) are one colour with noise of a codec or an edge


def save_layout(layout: Layout, path: str | Path) -> Path:
    """Write ``path`` (JSON) and one PNG per mask beside it, named after it; returns the path.

    What is at its default is left out. Masks are kept to 8 bits.
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
    """Read a layout that :func:`save_layout` wrote, or one written by hand; masks lie in its folder, or below it.

    ValueError in one sentence for a missing or damaged file, an unknown key, a value of the wrong kind, or anything
    that :class:`localctl.layout.Layout` refuses. Without a prompt, the phrases are joined to one.
    """
    path = Path(path)
    content = read_object(path, "The file")
    _check_keys(content, _LAYOUT_KEYS, f"The layout {path}")
    items = content.get("regions", [])
    if not isinstance(items, list):
        raise ValueError(f"'regions' in {path} is a list of regions, not {shown(items)}.")
    check_count(len(items), f"The layout {path}")
    regions = [_region(item, path, index) for index, item in enumerate(items)]
    for name in ("height", "width"):
        if not (content.get(name) is None or type(content[name]) is int):
            raise ValueError(f"'{name}' in {path} is a number of pixels, not {shown(content[name])}.")
    size = content.get("height"), content.get("width")
    try:
        return Layout.from_segments(regions, content.get("prompt"), *size, content.get("overlap", "share"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_colors(
    image: str | Path | Image.Image,
    phrases: Mapping[Color | str, str],
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
) -> Layout:
    """Make a layout from an image with one colour per region.

    Args:
        image: smooth edges and the noise of a codec are allowed: every pixel goes to the nearest colour of the table.
        phrases: colour, (r, g, b) or "#rrggbb", to phrase; "" for a part without words.
        prompt: without one, the phrases are joined.
        size: (height, width) of the layout in pixels; the image's own by default, rounded to a multiple of 8.

    Raises:
        ValueError: a colour that is none, or that nothing in the image has; two that are too alike.
    """
    check_count(len(phrases), "The table of colours")
    colors = [_color(color) for color in phrases]
    array = _rgb(image)  # (H,W,3)
    masks = _nearest_color(array, colors)
    segments = []
    for color, phrase, mask in zip(phrases, phrases.values(), masks, strict=True):
        near = np.abs(array[mask.numpy()[0] > 0] - np.array(_color(color))).max(axis=-1, initial=0)
        if not mask.any() or near.min() > _MIN_DISTANCE:
            raise ValueError(f"The colour {color} of the phrase {phrase!r} is nowhere in the image; check the table.")
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

    A category's n-th box goes to its n-th appearance in the prompt; where there are fewer appearances than boxes, the
    last one gets the rest. A name's underscores are spaces, and the prompt may have its plural ("two persons"). Without
    a prompt, the names of all boxes are joined. Crowds are left out. Boxes are cut to the image; those without an area
    in it are left out, with a warning. ``categories`` limits which are used. The size is the image's, rounded to
    multiples of 8. Ids may be text or numbers. What has no box, or a category that the file does not list, is left out,
    too.

    ValueError for a file that is not COCO, an unknown image or category, no box that is left, or as for the layout.
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
            f"These are no COCO annotations of boxes (trouble with {error}); give an instances file."
        ) from error
    height, width = (_coco_side(side, sides, image_id) for side in sides)
    used = _used_boxes(found, (height, width), _chosen_names(categories, names.values()), image_id)
    size = near_side(height), near_side(width)
    if prompt is None:
        return Layout.from_segments([Region(spoken(name), box) for name, box in used], None, *size)
    boxes: dict[str, list[Any]] = {}
    for name, box in used:
        boxes.setdefault(name, []).append(box)
    regions = []
    for name, several in boxes.items():
        said = (places(prompt, name) or [(spoken(name), 0)])[: len(several)]  # the layout says what is not there
        for place, (phrase, occurrence) in enumerate(said):
            own = several[place:] if place == len(said) - 1 else several[place : place + 1]
            regions.append(Region(phrase, own, occurrence=occurrence))
    return Layout(prompt, *size, tuple(regions))


def _used_boxes(
    found: Sequence[tuple[str, Any]], size: tuple[int, int], names: Collection[str], image_id: Any
) -> list[tuple[str, Box]]:
    """Choose name and box (xyxy in [0, 1]) of what lies in the image; what does not is left out, and said."""
    placed = [(name, coco_box(box, size[1], size[0])) for name, box in found if name in names or not name]
    used = [(name, box) for name, box in placed if box is not None and name]
    lost = len(placed) - len(used)
    if placed and not used:
        raise ValueError(
            f"None of the {lost} boxes of the image {image_id} has an area in it, and a category that is listed; check "
            "the annotations."
        )
    if lost:
        warnings.warn(
            f"{lost} of {len(placed)} boxes of the image {image_id} are left out: no area in the image, or no category "
            "that is listed.",
            stacklevel=3,
        )
    return used


def _coco_side(side: Any, sides: Any, image_id: Any) -> int:
    """Read a side of the image in pixels."""
    try:
        pixels = int(float(side))
    except (TypeError, ValueError, OverflowError):
        pixels = 0
    if not 0 < pixels <= MAX_SIDE:
        raise ValueError(
            f"The image {image_id} of the COCO annotations is (height, width) {shown(sides)}; a side has 1 to "
            f"{MAX_SIDE} pixels."
        )
    return pixels


def _chosen_names(categories: Sequence[str] | None, names: Collection[str]) -> Collection[str]:
    """Find the names that ``categories`` mean, in any case and with or without underscores."""
    if categories is None:
        return names
    known = {spoken(name).lower(): name for name in names}
    chosen = []
    for category in [categories] if isinstance(categories, str) else categories:
        name = known.get(spoken(str(category)).lower())
        if name is None:
            near = difflib.get_close_matches(str(category), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {len(names)}."
            raise ValueError(f"There is no category {category!r} in the COCO annotations; {hint}")
        chosen.append(name)
    return chosen


def from_dense_diffusion(folder: str | Path, index: int | str, size: tuple[int, int] | None = None) -> Layout:
    """Read one scene of DenseDiffusion's benchmark: ``valset.json`` (its pickle as JSON) and ``<index>.png``.

    As published, the colours of the image are ordered by their area, with black or white put first, and belong to the
    descriptions in that order; an empty description is a part without words.

    ValueError for files that are missing or not of this format.
    """
    folder = Path(folder)
    content = read_object(folder / "valset.json", "The file")
    scene = content.get(str(index))
    if not isinstance(scene, dict) or not {"textual_condition", "segment_descriptions"} <= set(scene):
        raise ValueError(f"There is no scene {index} in {folder / 'valset.json'}; it has {len(content)}.")
    texts = scene["segment_descriptions"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The descriptions of scene {index} are a list of texts, not {shown(texts)}.")
    check_count(len(texts), f"Scene {index} in {folder / 'valset.json'}")
    array = _rgb(folder / f"{index}.png")
    colors = _main_colors(array, len(texts))
    if len(colors) < len(texts):
        raise ValueError(f"{folder / f'{index}.png'} has {len(colors)} colours for {len(texts)} descriptions.")
    for color in ((0, 0, 0), (255, 255, 255)):
        close = [item for item in colors if float(np.linalg.norm(np.subtract(item, color))) < _MIN_DISTANCE]
        if close:
            colors.remove(close[0])
            colors.insert(0, close[0])
    segments = [Region(text, mask=mask) for text, mask in zip(texts, _nearest_color(array, colors), strict=True)]
    height, width = size or array.shape[:2]
    return Layout.from_segments(segments, scene["textual_condition"], height, width)


def _region(item: Any, path: Path, index: int) -> Region:
    where = f"Region {index} of {path}"
    _check_keys(item, _REGION_KEYS, where)
    values = dict(item)
    if values.get("mask") is not None:
        if not isinstance(values["mask"], str):
            mask = shown(values["mask"])
            raise ValueError(f"'mask' of region {index} of {path} is the name of an image, not {mask}.")
        values["mask"] = load_mask(_beside(path, values["mask"], where))
    try:
        return Region(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _beside(path: Path, name: str, where: str) -> Path:
    """Find the file of a mask. A layout may be anybody's: it names no file outside its folder."""
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or Path(inside).parts[:1] == ("..",) or Path(inside).drive:
        raise ValueError(
            f"{where} has its mask {shown(name)} outside the folder of the layout; copy the mask beside the layout."
        )
    try:
        (path.parent / inside).stat()
    except FileNotFoundError:
        pass  # the reader of images says it
    except (OSError, ValueError) as error:  # a name that is too long, or with a null byte
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{where}: the mask {shown(name)} cannot be read ({reason}).") from error
    return path.parent / inside


def _check_keys(content: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is an object with named fields, not {shown(content)}.")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}."
            raise ValueError(f"{where} has an unknown field {shown(key)}; {hint}")


def _rgb(image: str | Path | Image.Image) -> np.ndarray:
    """Read an image as (H,W,3) float32, 0-255."""
    loaded = image if isinstance(image, Image.Image) else load_image(image)
    return np.asarray(loaded.convert("RGB"), dtype=np.float32)


def _color(color: Color | str) -> Color:
    try:
        values = bytes.fromhex(color.lstrip("#")) if isinstance(color, str) else bytes(color)
    except (ValueError, TypeError):
        values = b""
    if len(values) != 3:
        raise ValueError(f"{color!r} is not a colour; write #rrggbb or three numbers from 0 to 255.")
    return values[0], values[1], values[2]


def _nearest_color(array: np.ndarray, colors: Sequence[Color]) -> list[Tensor]:
    """Make one mask (1,H,W) per colour: the pixels that are nearer to it than to the others."""
    for index, color in enumerate(colors):
        for other in colors[:index]:
            if np.linalg.norm(np.subtract(color, other)) < 3:
                raise ValueError(f"The colours {other} and {color} are too alike to tell apart; choose others.")
    distance = np.stack([((array - np.array(color, np.float32)) ** 2).sum(axis=-1) for color in colors])
    nearest = distance.argmin(axis=0)  # (H,W)
    return [torch.from_numpy((nearest == index).astype(np.float32))[None] for index in range(len(colors))]


def _main_colors(array: np.ndarray, count: int) -> list[Color]:
    """Find the ``count`` most frequent colours that differ clearly, the most frequent first."""
    packed = array.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])  # one number per pixel sorts much faster
    values, counts = np.unique(packed, return_counts=True)
    chosen: list[Color] = []
    for value in values[np.argsort(-counts, kind="stable")].tolist():
        color = (value >> 16, value >> 8 & 255, value & 255)
        if all(np.linalg.norm(np.subtract(color, other)) >= _MIN_DISTANCE for other in chosen):
            chosen.append(color)
        if len(chosen) == count:
            break
    return chosen
