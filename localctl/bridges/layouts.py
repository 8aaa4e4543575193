"""Layouts from and to the formats of other programs: one table of formats, and how a file is recognised."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from localctl.bridges import captions, comfyui, regional_prompter, webui
from localctl.bridges.parts import (
    Exported,
    Inputs,
    Size,
    json_file,
    left_out,
    no_image,
    overlap_note,
    painted,
    worded,
)
from localctl.coco import from_coco
from localctl.color_maps import Color, as_color, from_colors
from localctl.files import first_line, parse_json
from localctl.images import load_image, png_bytes
from localctl.layout import Layout
from localctl.layout_io import as_content, from_content
from localctl.masks import mask_to_pil
from localctl.messages import nearest
from localctl.png import is_png
from localctl.sizes import shown

_BLACK = (0, 0, 0)


def _write_own(layout: Layout, name: str) -> Exported:
    content, masks = as_content(layout, name)
    return Exported({**json_file(f"{name}.json", content), **{n: png_bytes(mask_to_pil(m)) for n, m in masks.items()}})


def _read_own(content: Mapping[str, Any], inputs: Inputs) -> Layout:
    if inputs.prompt is not None:
        content = {**content, "prompt": inputs.prompt}
    return from_content(content, lambda name, where: np.asarray(inputs.image(name).convert("L")) / 255, "the layout")


def _write_colors(layout: Layout, name: str) -> Exported:
    """Write an image with a colour per region on black, and the table of colours."""
    colors = {
        "#{:02x}{:02x}{:02x}".format(*regional_prompter.region_color(index)): region.phrase or ""
        for index, region in enumerate(worded(layout))
    }
    table = {"image": f"{name}.png", "prompt": layout.prompt, "colors": {"#000000": "", **colors}}
    image = painted(layout, regional_prompter.region_color, _BLACK)
    files = {**json_file(f"{name}.json", table), f"{name}.png": png_bytes(image)}
    return Exported(files, (*overlap_note(layout), *left_out(layout, ("mask",))))


def _read_colors(content: Mapping[str, Any], inputs: Inputs) -> Layout:
    table = inputs.colors or content.get("colors")
    if not isinstance(table, Mapping) or not all(isinstance(phrase, str) for phrase in table.values()):
        raise ValueError("A colour map needs a table of colours, such as '#c04040=a red ball'; give it.")
    image = content.get("image")
    opened = image if isinstance(image, Image.Image) else inputs.image(str(image))
    prompt = inputs.prompt or content.get("prompt")
    used = {color: phrase for color, phrase in table.items() if phrase or _occurs(opened, color)}
    return from_colors(opened, used, prompt, inputs.size)


def _occurs(image: Image.Image, color: Color | str) -> bool:
    """Return whether an image has a pixel of exactly this colour."""
    return bool((np.asarray(image.convert("RGB")) == as_color(color)).all(axis=-1).any())


def _read_coco(content: Mapping[str, Any], inputs: Inputs) -> Layout:
    images = content.get("images")
    index = inputs.index
    if index is None and isinstance(images, list) and len(images) == 1 and isinstance(images[0], Mapping):
        index = images[0].get("id")
    if index is None:
        raise ValueError("The COCO annotations are of several images; choose one by its id, with --index.")
    return from_coco(content, index, inputs.prompt)


@dataclass(frozen=True)
class _Format:
    """A format of layouts. fits: whether parsed JSON, or a text, is of this format."""

    write: Callable[[Layout, str], Exported]
    read: Callable[[Any, Inputs], Layout]
    fits: Callable[[Any], bool]


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, Mapping) and set(keys) <= set(content)


def _is_workflow(content: Any) -> bool:
    nodes = content.get("prompt", content) if isinstance(content, Mapping) else None
    if _has("nodes", "links")(content):
        return True
    return isinstance(nodes, Mapping) and any(isinstance(n, Mapping) and "class_type" in n for n in nodes.values())


def _is_boxes(content: Any) -> bool:
    return isinstance(content, list) or _has("x", "y", "width", "height")(content) or _has("type", "bbox")(content)


def _mentions(pattern: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, str) and re.search(pattern, content) is not None


def _is_regional(content: Any) -> bool:
    return _has("alwayson_scripts")(content) or _mentions(r"\b(ADDROW|ADDCOL|ADDBASE|ADDCOMM|BREAK|RP Active)\b")(
        content
    )


_FORMATS = {  # the first that fits
    "ideogram": _Format(captions.write_ideogram, captions.read_ideogram, _has("compositional_deconstruction")),
    "gligen": _Format(captions.write_gligen, captions.read_gligen, _has("phrases", "locations")),
    "coco": _Format(captions.write_coco, _read_coco, _has("annotations", "categories")),
    "regional-prompter": _Format(regional_prompter.write, regional_prompter.read, _is_regional),
    "latent-couple": _Format(webui.write_couple, webui.read_couple, _mentions("divisions=")),
    "color-map": _Format(_write_colors, _read_colors, _has("image", "colors")),
    "comfyui": _Format(comfyui.write, comfyui.read, _is_workflow),
    "comfyui-boxes": _Format(captions.write_boxes, captions.read_boxes, _is_boxes),
    "localctl": _Format(_write_own, _read_own, _has("regions")),
}
LAYOUT_FORMATS = tuple(_FORMATS)


def export_layout(layout: Layout, format: str, name: str = "layout") -> Exported:
    """Write a layout in a format of ``LAYOUT_FORMATS``.

    ``name``: what the names of the files begin with. ValueError for an unknown format, a layout without regions with
    words, or a value that the format cannot hold and that cannot be left out.
    """
    return _format(format).write(layout, name)


def import_layout(
    content: bytes | str | Mapping[str, Any] | list[Any],
    format: str | None = None,
    *,
    images: Callable[[str], Image.Image] = no_image,
    prompt: str | None = None,
    size: Size | None = None,
    index: int | str | None = None,
    colors: Mapping[Color | str, str] | None = None,
) -> Layout:
    """Read a layout from the content of a file. What a layout does not hold is left out with a warning.

    Args:
        content: bytes or text of a file, or parsed JSON. An image is a colour map if ``colors`` are given; otherwise
            a PNG is read for the workflow or the parameters that ComfyUI or the web UI have written into it.
        format: one of ``LAYOUT_FORMATS``; None: recognised by the content.
        images: opens an image that the content names, such as a mask; by default none is opened.
        prompt: replaces the prompt that the content has.
        size: (height, width) in pixels, in place of the content's.
        index: id of the image in COCO annotations of several.
        colors: colour, (r, g, b) or #rrggbb, -> phrase, for a colour map; "" for a part without words.

    Raises:
        ValueError: the format is unknown or not the content's; the content is damaged; as for the layout.
    """
    inputs = Inputs(images, prompt, size, index, colors or {})
    if isinstance(content, bytes):
        content = _decoded(content, inputs)
    if isinstance(content, str) and content.lstrip().startswith(("{", "[")):
        try:
            content = parse_json(content)
        except ValueError as error:
            raise ValueError(f"The layout is not valid JSON ({first_line(error)}); repair it.") from None
    if format is None:
        format = next((name for name, item in _FORMATS.items() if item.fits(content)), None)
        if format is None:
            raise ValueError(
                f"The format of {shown(content)} is not recognised; give one of {', '.join(LAYOUT_FORMATS)}."
            )
    elif not _format(format).fits(content):
        raise ValueError(f"The content is not of the format {format}; leave the format out to have it recognised.")
    for name, value, only in (("index", index, "coco"), ("colors", colors, "color-map")):
        if value is not None and format != only:
            raise ValueError(f"{name} is for the format {only}, and this is {format}; leave it out.")
    layout = _format(format).read(content, inputs)
    return layout if size in (None, layout.size) else replace(layout, height=size[0], width=size[1])


def _decoded(content: bytes, inputs: Inputs) -> Any:
    """Return the text of a file; of a PNG the text that another program has written into it, or the colour map."""
    if inputs.colors and not content.lstrip().startswith(b"{"):
        return {"image": load_image(content, "the colour map"), "colors": inputs.colors}
    if not is_png(content):
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("The layout is neither text in UTF-8 nor a PNG; give JSON, a text or a PNG.") from None
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            texts = [image.info.get(key) for key in ("prompt", "parameters")]  # of ComfyUI, of the web UI
    except Exception as error:  # damaged files raise any error
        raise ValueError(f"The image cannot be read ({first_line(error)}); save it again.") from error
    found = next((text for text in texts if isinstance(text, str)), None)
    if found is None:
        raise ValueError("The PNG has no workflow and no parameters; for a colour map, give the colours and phrases.")
    return found


def _format(name: str) -> _Format:
    if name not in _FORMATS:
        raise ValueError(f"Unknown format {name!r} of a layout; {nearest(name, LAYOUT_FORMATS, _CHOICES)}")
    return _FORMATS[name]


_CHOICES = f"choose one of {', '.join(LAYOUT_FORMATS)}."
