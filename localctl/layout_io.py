"""Layouts in and out: JSON with masks beside it, colour-coded pictures, COCO boxes, DenseDiffusion's benchmark."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.images import load_image
from localctl.layout import SIZE_MULTIPLE, Layout, Region
from localctl.masks import load_mask, mask_to_pil
from localctl.phrases import find_phrase

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
                mask_to_pil(region.mask).save(path.with_name(value))  # type: ignore[arg-type]
            if field.name == "box" and value is not None:
                value = [list(box) for box in value]
                value = value[0] if len(value) == 1 else value
            if value != field.default:
                item[field.name] = value
        regions.append(item)
    content = {"prompt": layout.prompt, "height": layout.height, "width": layout.width, "overlap": layout.overlap}
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps({**content, "regions": regions}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load_layout(path: str | Path) -> Layout:
    """Read a layout that :func:`save_layout` wrote, or one written by hand; masks are looked up beside the file.

    ValueError in one sentence for a missing or damaged file, an unknown key, a value of the wrong kind, or anything
    that :class:`localctl.layout.Layout` refuses. Without a prompt, the phrases are joined to one.
    """
    path = Path(path)
    content = _read_json(path)
    _check_keys(content, _LAYOUT_KEYS, f"The layout {path}")
    items = content.get("regions", [])
    if not isinstance(items, list):
        raise ValueError(f"'regions' in {path} is a list of regions, not {items!r}.")
    regions = [_region(item, path, index) for index, item in enumerate(items)]
    for name in ("height", "width"):
        if not (content.get(name) is None or type(content[name]) is int):
            raise ValueError(f"'{name}' in {path} is a number of pixels, not {content[name]!r}.")
    size = content.get("height"), content.get("width")
    try:
        return Layout.from_segments(regions, content.get("prompt"), *size, content.get("overlap", "share"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_colors(
    picture: str | Path | Image.Image,
    phrases: Mapping[Color | str, str],
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
) -> Layout:
    """A layout from a picture with one colour per region.

    Args:
        picture: smooth edges and the noise of a codec are allowed: every pixel goes to the nearest colour of the table.
        phrases: colour, (r, g, b) or "#rrggbb", to phrase; "" for a part without words.
        prompt: without one, the phrases are joined.
        size: (height, width) of the layout in pixels; the picture's own by default, rounded to a multiple of 8.

    Raises:
        ValueError: a colour that is none, or that nothing in the picture has; two that are too alike.
    """
    colors = [_color(color) for color in phrases]
    array = _rgb(picture)  # (H,W,3)
    masks = _nearest_color(array, colors)
    segments = []
    for color, phrase, mask in zip(phrases, phrases.values(), masks, strict=True):
        near = np.abs(array[mask.numpy()[0] > 0] - np.array(_color(color))).max(axis=-1, initial=0)
        if not mask.any() or near.min() > _MIN_DISTANCE:
            raise ValueError(f"The colour {color} of the phrase {phrase!r} is nowhere in the picture; check the table.")
        segments.append(Region(phrase, mask=mask))
    height, width = size or (_rounded(array.shape[0]), _rounded(array.shape[1]))
    return Layout.from_segments(segments, prompt, height, width)


def from_coco(
    annotations: str | Path | Mapping[str, Any],
    image_id: int,
    prompt: str | None = None,
    categories: Sequence[str] | None = None,
) -> Layout:
    """A layout from the boxes of one image in COCO's format (``images``, ``annotations``, ``categories``).

    A category's n-th box goes to its n-th appearance in the prompt; where there are fewer appearances than boxes, the
    last one gets the rest. Without a prompt, the names of all boxes are joined. Crowds are left out. ``categories``
    limits which are used. The size is the image's, rounded to multiples of 8.

    ValueError for a file that is not COCO, an unknown image, or as for the layout.
    """
    content = _read_json(Path(annotations)) if isinstance(annotations, (str, Path)) else annotations
    try:
        names = {item["id"]: str(item["name"]) for item in content["categories"]}
        image = next((item for item in content["images"] if item["id"] == image_id), None)
        found = [
            (names[item["category_id"]], tuple(float(value) for value in item["bbox"]))
            for item in content["annotations"]
            if item["image_id"] == image_id and not item.get("iscrowd", 0)
        ]
        if image is None:
            raise ValueError(f"There is no image {image_id} in the COCO annotations; check the id.")
        height, width = int(image["height"]), int(image["width"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"These are no COCO annotations of boxes (trouble with {error}); give an instances file."
        ) from error
    used = [(name, _coco_box(box, height, width)) for name, box in found if categories is None or name in categories]
    height, width = _rounded(height), _rounded(width)
    if prompt is None:
        return Layout.from_segments([Region(name, box) for name, box in used], None, height, width)
    boxes: dict[str, list[Any]] = {}
    for name, box in used:
        boxes.setdefault(name, []).append(box)
    regions = []
    for name, several in boxes.items():
        places = max(1, min(len(find_phrase(prompt, name)), len(several)))
        for place in range(places):
            regions.append(Region(name, several[place:] if place == places - 1 else several[place], occurrence=place))
    return Layout(prompt, height, width, tuple(regions))


def from_dense_diffusion(folder: str | Path, index: int | str, size: tuple[int, int] | None = None) -> Layout:
    """One scene of DenseDiffusion's benchmark: ``valset.json`` (its pickle as JSON) and ``<index>.png``.

    As published, the colours of the picture are ordered by their area, with black or white put first, and belong to the
    descriptions in that order; an empty description is a part without words.

    ValueError for files that are missing or not of this format.
    """
    folder = Path(folder)
    content = _read_json(folder / "valset.json")
    scene = content.get(str(index))
    if not isinstance(scene, dict) or not {"textual_condition", "segment_descriptions"} <= set(scene):
        raise ValueError(f"There is no scene {index} in {folder / 'valset.json'}; it has {len(content)}.")
    texts = scene["segment_descriptions"]
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
            raise ValueError(f"'mask' of region {index} of {path} is the name of a picture, not {values['mask']!r}.")
        values["mask"] = load_mask(path.parent / values["mask"])
    try:
        return Region(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The file {path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repair it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object with named fields.")
    return content


def _check_keys(content: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is an object with named fields, not {content!r}.")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}."
            raise ValueError(f"{where} has an unknown field {key!r}; {hint}")


def _rgb(picture: str | Path | Image.Image) -> np.ndarray:
    """(H,W,3) float32, 0-255."""
    image = picture if isinstance(picture, Image.Image) else load_image(picture)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _color(color: Color | str) -> Color:
    try:
        values = bytes.fromhex(color.lstrip("#")) if isinstance(color, str) else bytes(color)
    except (ValueError, TypeError):
        values = b""
    if len(values) != 3:
        raise ValueError(f"{color!r} is not a colour; write #rrggbb or three numbers from 0 to 255.")
    return values[0], values[1], values[2]


def _nearest_color(array: np.ndarray, colors: Sequence[Color]) -> list[Tensor]:
    """One mask (1,H,W) per colour: the pixels that are nearer to it than to the others."""
    for index, color in enumerate(colors):
        for other in colors[:index]:
            if np.linalg.norm(np.subtract(color, other)) < 3:
                raise ValueError(f"The colours {other} and {color} are too alike to tell apart; choose others.")
    distance = np.stack([((array - np.array(color, np.float32)) ** 2).sum(axis=-1) for color in colors])
    nearest = distance.argmin(axis=0)  # (H,W)
    return [torch.from_numpy((nearest == index).astype(np.float32))[None] for index in range(len(colors))]


def _main_colors(array: np.ndarray, count: int) -> list[Color]:
    """The ``count`` most frequent colours that differ clearly, the most frequent first."""
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


def _rounded(side: int) -> int:
    """The nearest size in pixels that the bases can draw."""
    return max(SIZE_MULTIPLE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE)


def _coco_box(box: tuple[float, ...], height: int, width: int) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) in pixels as xyxy in [0, 1], cut to the image."""
    if len(box) != 4:
        raise ValueError(f"A COCO box is (x, y, width, height), not {box}.")
    x, y, w, h = box
    return (
        min(max(x / width, 0.0), 1.0),
        min(max(y / height, 0.0), 1.0),
        min(max((x + w) / width, 0.0), 1.0),
        min(max((y + h) / height, 0.0), 1.0),
    )
