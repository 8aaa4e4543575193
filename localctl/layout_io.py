"""Read and write layouts: JSON with mask files; other formats are in ``color_maps``, ``coco`` and ``bridges``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from localctl.coco import from_coco as from_coco
from localctl.color_maps import from_colors as from_colors
from localctl.color_maps import from_dense_diffusion as from_dense_diffusion
from localctl.files import first_line, read_object, write_json
from localctl.layout import Layout, Region
from localctl.layout_checks import check_count
from localctl.masks import load_mask, mask_to_pil
from localctl.sizes import shown

_LAYOUT_KEYS = ("prompt", "height", "width", "overlap", "regions")
_REGION_KEYS = tuple(field.name for field in fields(Region))


def save_layout(layout: Layout, path: str | Path) -> Path:
    """Write ``path`` (JSON) and one PNG per mask in its folder, named after it; return the path.

    Values equal to their defaults are left out. Masks are saved with 8 bits.
    """
    path = Path(path)
    content, masks = as_content(layout, path.stem)
    for name, mask in masks.items():
        mask_to_pil(mask).save(path.with_name(name))
    write_json(path, content, indent=1, ensure_ascii=False)
    return path


def as_content(layout: Layout, stem: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON of a layout, and its masks by the names of their files, which begin with ``stem``."""
    regions, masks = [], {}
    for index, region in enumerate(layout.regions):
        item: dict[str, Any] = {}
        for field in fields(Region):
            value = getattr(region, field.name)
            if field.name == "mask" and value is not None:
                name = f"{stem}_mask_{index}.png"
                masks[name], value = value, name
            if field.name == "box" and value is not None:
                value = [list(box) for box in value]
                value = value[0] if len(value) == 1 else value
            if value != field.default:
                item[field.name] = value
        regions.append(item)
    content = {"prompt": layout.prompt, "height": layout.height, "width": layout.width, "overlap": layout.overlap}
    return {**{name: value for name, value in content.items() if value is not None}, "regions": regions}, masks


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
