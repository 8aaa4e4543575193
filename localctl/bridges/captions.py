"""Layouts as lists of texts with boxes: ComfyUI's bounding boxes, captions of Ideogram 4, GLIGEN's phrases, COCO.

Sources: ``comfy_extras/nodes_bounding_boxes.py`` and ``nodes_json_prompt.py`` of comfyanonymous/ComfyUI (commits
cff62dd and 77cb848); ``pipelines/ideogram4/prompt_enhancer.py`` of diffusers 0.42.1;
``gligen_inference.py`` of gligen/GLIGEN.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from localctl.bridges.parts import (
    DEFAULT_SIDE,
    Exported,
    Inputs,
    as_text,
    box_of,
    boxes_of,
    json_file,
    layout_of,
    left_out,
    text_of,
    worded,
)
from localctl.layout import Layout, Region
from localctl.layout_checks import Box
from localctl.sizes import shown

_GRID = 1000  # Ideogram's coordinates are whole numbers from 0 to 1000: [y0, x0, y1, x1]
_SIZE = f"The layout has no size: pixels are of {DEFAULT_SIDE}x{DEFAULT_SIDE}."


def write_boxes(layout: Layout, name: str) -> Exported:
    """Write the boxes that ComfyUI's node 'Create Bounding Boxes' takes, in pixels, with the texts as descriptions."""
    height, width = layout.size or (DEFAULT_SIDE, DEFAULT_SIDE)
    boxes = []
    for region in worded(layout):
        for x0, y0, x1, y1 in boxes_of(region):
            left, top = round(x0 * width), round(y0 * height)
            box = {"x": left, "y": top, "width": round(x1 * width) - left, "height": round(y1 * height) - top}
            about = {"type": "obj", "text": "", "desc": text_of(region), "palette": []}
            boxes.append({**box, "metadata": about})
    notes = (
        f"ComfyUI: give the text of the file to 'bboxes' of 'Create Bounding Boxes', {width} wide and {height} high.",
        "The format has no prompt for the whole image: left out.",
        *left_out(layout, ("prompt",)),
        *(() if layout.size else (_SIZE,)),
    )
    return Exported(json_file(f"{name}.json", boxes), notes)


def read_boxes(content: Any, inputs: Inputs) -> Layout:
    """Read ComfyUI's bounding boxes: pixels with a size, or elements with a ``bbox`` as in Ideogram's captions.

    Boxes without a description are regions without words. ValueError without a size for boxes in pixels.
    """
    frame = [content] if isinstance(content, Mapping) else content
    frame = frame[0] if isinstance(frame, list) and frame and isinstance(frame[0], list) else frame
    if not isinstance(frame, list) or not all(isinstance(box, Mapping) for box in frame):
        raise ValueError(f"Bounding boxes must be a list of objects, not {shown(content)}.")
    if any("bbox" in box for box in frame):
        return layout_of(inputs.prompt or "", [_element(box) for box in frame], inputs.size)
    size, regions = inputs.needed_size(), []
    for box in frame:
        about = box.get("metadata")
        about = about if isinstance(about, Mapping) else {}
        words = as_text(about.get("desc") or about.get("text") or box.get("label") or "", "The description of a box")
        place = box_of([box.get(key) for key in ("x", "y", "width", "height")], size)
        regions.append(Region(words, place))
    return layout_of(inputs.prompt or "", regions, size)


def write_ideogram(layout: Layout, name: str) -> Exported:
    """Write a caption of Ideogram 4, with an element for each box."""
    elements = []
    for region in worded(layout):
        for x0, y0, x1, y1 in boxes_of(region):
            box = [round(value * _GRID) for value in (y0, x0, y1, x1)]
            if box[0] == box[2] or box[1] == box[3]:
                raise ValueError(f"The box of the region {region.name} is under a {_GRID}th of the image; enlarge it.")
            elements.append({"type": "obj", "bbox": box, "desc": text_of(region)})
    parts = {"background": "", "elements": elements}
    caption = {"high_level_description": layout.prompt, "compositional_deconstruction": parts}
    note = "Ideogram wants a 'background', which a layout does not have: describe it there."
    return Exported(json_file(f"{name}.json", caption), (note, *left_out(layout, ("prompt",))))


def read_ideogram(content: Mapping[str, Any], inputs: Inputs) -> Layout:
    """Read a caption of Ideogram 4: the description and the background are the prompt, elements with a box regions."""
    parts = content.get("compositional_deconstruction")
    if not isinstance(parts, Mapping) or not isinstance(parts.get("elements"), list):
        raise ValueError("The caption has no 'compositional_deconstruction' with a list 'elements'; correct it.")
    elements = parts["elements"]
    if not all(isinstance(element, Mapping) for element in elements):
        raise ValueError("The 'elements' of the caption must be objects with 'type', 'bbox' and 'desc'; correct it.")
    texts = [content.get("high_level_description", ""), parts.get("background", "")]
    texts += [element.get("desc", "") for element in elements if element.get("bbox") is None]
    base = ", ".join(text.rstrip(".") for text in (as_text(text, "A text of the caption") for text in texts) if text)
    if content.get("style_description") or any(element.get("color_palette") for element in elements):
        warnings.warn("The caption's style and palettes are left out: a layout does not hold them.", stacklevel=2)
    regions = [_element(element) for element in elements if element.get("bbox") is not None]
    return layout_of(inputs.prompt or base, regions, inputs.size)


def _element(element: Mapping[str, Any]) -> Region:
    box, words = element.get("bbox"), element.get("desc") or element.get("text") or ""
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        raise ValueError(f"A 'bbox' of the caption must be [y0, x0, y1, x1] from 0 to {_GRID}, not {shown(box)}.")
    y0, x0, y1, x1 = box
    try:
        sides = min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0)
    except TypeError:
        raise ValueError(f"A 'bbox' of the caption must be four numbers, not {shown(box)}.") from None
    return Region(as_text(words, "The description of an element").rstrip("."), box_of(sides, (_GRID, _GRID)))


def write_gligen(layout: Layout, name: str) -> Exported:
    """Write the prompt, phrases and locations (xyxy in [0, 1]) of GLIGEN; a phrase with several boxes is repeated."""
    pairs: list[tuple[str, Box]] = [(text_of(region), box) for region in worded(layout) for box in boxes_of(region)]
    content = {"prompt": layout.prompt, "phrases": [text for text, _ in pairs], "locations": [b for _, b in pairs]}
    return Exported(json_file(f"{name}.json", content), left_out(layout, ("prompt",)))


def read_gligen(content: Mapping[str, Any], inputs: Inputs) -> Layout:
    """Read ``prompt``, ``phrases`` and ``locations``. ValueError unless the lists have the same length."""
    phrases, places = content.get("phrases"), content.get("locations")
    if not isinstance(phrases, list) or not isinstance(places, list) or len(phrases) != len(places):
        raise ValueError("GLIGEN's 'phrases' and 'locations' must be lists of the same length; correct them.")
    rest = sorted(set(content) - {"prompt", "phrases", "locations"})
    if rest:
        warnings.warn(f"GLIGEN's {', '.join(rest)} are left out: a layout does not hold them.", stacklevel=2)
    regions = [Region(as_text(phrase, "A phrase"), box) for phrase, box in zip(phrases, places, strict=True)]
    return layout_of(inputs.prompt or as_text(content.get("prompt", ""), "The prompt"), regions, inputs.size)


def write_coco(layout: Layout, name: str) -> Exported:
    """Write COCO annotations of one image, 1, whose categories are the phrases."""
    height, width = layout.size or (DEFAULT_SIDE, DEFAULT_SIDE)
    names: dict[str, int] = {}
    annotations: list[dict[str, Any]] = []
    for region in worded(layout):
        category = names.setdefault(region.phrase or text_of(region), len(names) + 1)
        for x0, y0, x1, y1 in boxes_of(region):
            box = [round(value, 2) for value in (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)]
            about = {"id": len(annotations) + 1, "image_id": 1, "category_id": category, "iscrowd": 0}
            annotations.append({**about, "bbox": box, "area": round(box[2] * box[3], 2)})
    image = {"id": 1, "width": width, "height": height, "file_name": f"{name}.png"}
    categories = [{"id": number, "name": text} for text, number in names.items()]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    notes = ("The format has no prompt for the whole image: left out.", *left_out(layout, ()))
    return Exported(json_file(f"{name}.json", content), (*notes, *(() if layout.size else (_SIZE,))))
