"""Layouts of sd-webui-regional-prompter: a matrix of rows and columns as text, or a coloured mask with a request.

Sources: ``README.md`` (2D regions, mask regions, API), ``scripts/regions.py`` (order of rows and columns, colours) and
``scripts/rp.py`` (names of parameters) of hako-mikan/sd-webui-regional-prompter.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from localctl.bridges.parts import (
    Exported,
    Inputs,
    Size,
    as_text,
    box_of,
    json_file,
    layout_of,
    left_out,
    overlap_note,
    painted,
    text_of,
    worded,
)
from localctl.bridges.webui import decimal, format_infotext, parse_infotext, plain, size_parameter
from localctl.images import png_bytes
from localctl.layout import Layout, Region
from localctl.layout_checks import Box
from localctl.sizes import shown

NAME = "Regional Prompter"
_WHITE = (255, 255, 255)
_BASE_RATIO = "0.2"  # the share of the whole image's prompt in each region, as in its README
_KEYS = re.compile(r"\b(ADDROW|ADDCOL|BREAK|AND)\b")


def region_color(index: int) -> tuple[int, int, int]:
    """Return the colour of the region ``index``: half saturated, half bright, its hue halfway between earlier ones."""
    digits = index.bit_length()
    hue = (2 * (index - (1 << digits - 1)) + 1) / (1 << digits) if index else 0.0
    red, green, blue = (int(value * 256) for value in colorsys.hsv_to_rgb(hue, 0.5, 0.5))
    return red, green, blue


def write(layout: Layout, name: str) -> Exported:
    """Write a text for the prompt box if the regions are rows of columns, or columns of rows, that fill the image; else
    a coloured mask and the request for the web UI's API."""
    regions = worded(layout)
    boxes = [region.boxes[0] for region in regions if len(region.boxes) == 1]
    kept = ("prompt",)
    for mode, turned in (("Columns", False), ("Rows", True)):
        order = _matrix([_turn(box) if turned else box for box in boxes]) if len(boxes) == len(regions) else None
        if order:
            parameters = {
                "RP Active": "True",
                "RP Divide mode": "Matrix",
                "RP Matrix submode": mode,
                "RP Ratios": _ratios(order, turned),
                "RP Base Ratios": _BASE_RATIO,
                "RP Use Base": "True",
            }
            keys = ("ADDCOL", "ADDROW") if turned else ("ADDROW", "ADDCOL")
            by_box = {(_turn(box) if turned else box): region for box, region in zip(boxes, regions, strict=True)}
            rows = [f" {keys[1]} ".join(text_of(by_box[box]) for box in row) for row in order]
            text = f"{layout.prompt} ADDBASE {f' {keys[0]} '.join(rows)}"
            note = "Web UI: paste the text into the prompt and press the arrow button."
            content = format_infotext(text, {**size_parameter(layout), **parameters}).encode()
            return Exported({f"{name}.txt": content}, (note, *left_out(layout, kept)))
    image = f"{name}_regions.png"
    prompt = " BREAK ".join([layout.prompt, *map(text_of, regions)])
    args = [True, False, "Mask", "Columns", "Mask", "Prompt", "1,1", _BASE_RATIO, True, False, False, "Attention"]
    size = {"width": layout.width, "height": layout.height} if layout.size else {}
    scripts = {NAME: {"args": [*args, False, "0", "0", "0", image]}}
    request = {"prompt": prompt, **size, "alwayson_scripts": scripts}
    map_ = {image: png_bytes(painted(layout, region_color, _WHITE))}
    notes = (
        f"Web UI: choose the mode Mask and 'Use base prompt' in {NAME}, upload the image as the mask, and copy the "
        "prompt; or send the file to /sdapi/v1/txt2img, with the image's path on the server.",
        *overlap_note(layout),
        *left_out(layout, (*kept, "mask")),
    )
    return Exported({**json_file(f"{name}.json", request), **map_}, notes)


@dataclass(frozen=True)
class _Settings:
    """The extension's settings that decide where regions are."""

    prompt: str
    mode: str
    matrix: str
    ratios: str
    use_base: bool
    use_common: bool
    flip: bool
    mask: str
    size: tuple[Any, Any]  # (height, width)


def read(content: Any, inputs: Inputs) -> Layout:
    """Read a text with the extension's keywords or parameters, or a request for the API.

    The base prompt and the common prompt are the layout's prompt. Without ratios, cells are equal.

    ValueError for the mode Prompt, whose regions exist only while sampling, or ratios that do not fit the prompt.
    """
    settings = _of_request(content) if isinstance(content, Mapping) else _of_text(content)
    size = inputs.sized(*settings.size) if any(settings.size) else inputs.size
    text, before = inputs.prompt or settings.prompt, []
    for key, kind, used in (("ADDCOMM", "common", settings.use_common), ("ADDBASE", "base", settings.use_base)):
        if key in text or used:
            first, found, rest = text.partition(key) if key in text else _first_part(text)
            if not found:
                raise ValueError(f"{NAME} uses a {kind} prompt, but the prompt has one part; add BREAK.")
            before.append(plain(first))
            text = rest
    base = ", ".join(filter(None, before))
    if settings.mode == "Mask":
        return _read_mask(base, _KEYS.split(text)[::2], settings, inputs, size)
    if settings.mode != "Matrix":
        raise ValueError(f"The mode {settings.mode} of {NAME} finds regions while sampling; use Matrix or Mask.")
    cells = _cells(text, settings)
    return layout_of(base, [Region(plain(words), box) for words, box in cells], size)


def _read_mask(base: str, texts: Sequence[str], settings: _Settings, inputs: Inputs, size: Size | None) -> Layout:
    """Read the mode Mask. Without a base prompt, pixels without a colour of a region belong to the first one."""
    if not settings.mask:
        raise ValueError(f"The mode Mask of {NAME} needs its mask; give the request with the name of the image.")
    image = np.asarray(inputs.image(settings.mask).convert("RGB"), np.int16)
    masks = [np.abs(image - region_color(index)).max(axis=-1) <= 1 for index in range(len(texts))]
    if not settings.use_base and "ADDBASE" not in settings.prompt:
        masks[0] |= ~np.any(masks, axis=0)
    for index, mask in enumerate(masks):
        if not mask.any():
            raise ValueError(
                f"The mask has no pixel of the region {index}, whose colour is {region_color(index)}; the prompt has "
                f"{len(texts)} regions."
            )
    regions = [Region(plain(words), mask=mask.astype(np.float32)) for words, mask in zip(texts, masks, strict=True)]
    return layout_of(base, regions, size or inputs.sized(*image.shape[:2]))


def _of_text(text: str) -> _Settings:
    info = parse_infotext(text)
    given = info.parameters
    return _Settings(
        info.prompt,
        given.get("RP Divide mode", "Matrix"),
        given.get("RP Matrix submode", "Columns"),
        given.get("RP Ratios", ""),
        given.get("RP Use Base") == "True",
        given.get("RP Use Common") == "True",
        given.get("RP Flip") == "True",
        "",
        info.size or (None, None),
    )


def _of_request(content: Mapping[str, Any]) -> _Settings:
    try:
        args = list(content["alwayson_scripts"][NAME]["args"])
    except (KeyError, TypeError):
        raise ValueError(f"The request has no 'alwayson_scripts' with 'args' of {NAME}; correct it.") from None
    args += [None] * (20 - len(args))
    texts = [as_text(args[place] or "", f"Argument {place + 1} of {NAME}") for place in (2, 3, 6, 16)]
    mode, matrix, ratios, mask = texts
    prompt = as_text(content.get("prompt"), "The prompt of the request")
    size = (content.get("height"), content.get("width"))
    return _Settings(prompt, mode, matrix, ratios, args[8] is True, args[9] is True, args[19] is True, mask, size)


def _first_part(text: str) -> tuple[str, str, str]:
    found = _KEYS.search(text)
    return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")


def _cells(text: str, settings: _Settings) -> list[tuple[str, Box]]:
    """Return the words and the box of each cell of the matrix.

    "Columns" (once "Horizontal") is rows of columns: ``;`` and ADDROW part rows, ``,`` and ADDCOL the columns in them.
    "Rows" ("Vertical") is columns of rows: ``,`` and ADDCOL part columns, ``;`` and ADDROW the rows in them. Ratios
    without ``;`` part one direction alone. With ``;``, the first number of each group is the group's own ratio.
    """
    turned = settings.matrix in ("Rows", "Vertical")
    ratios = settings.ratios.replace(" ", "")
    ratios = _flipped(ratios) if settings.flip else ratios
    keys = {key for key in ("ADDROW", "ADDCOL") if key in text}
    outer_key, inner_key = ("ADDCOL", "ADDROW") if turned else ("ADDROW", "ADDCOL")
    if keys:  # BREAK inside a cell starts a new chunk of tokens
        cells = [[re.sub(r"\b(BREAK|AND)\b", ",", c) for c in row.split(inner_key)] for row in text.split(outer_key)]
    else:
        cells = _arranged(_KEYS.split(text)[::2], ratios, turned)
    if ";" not in ratios:
        values = [_ratio(value) for value in ratios.split(",") if value]
        groups = [(1.0, values)] if len(cells) == 1 else [(v, [1.0]) for v in values]
    else:
        groups = []
        for group in (_flipped(ratios) if turned else ratios).split(";"):
            first, *rest = (_ratio(value) for value in group.split(",") if value)
            groups.append((first, rest or [1.0]))
    if not ratios:
        groups = [(1.0, [1.0] * len(row)) for row in cells]
    if [len(row) for row in cells] != [len(parts) for _, parts in groups]:
        counts = [len(parts) for _, parts in groups]
        raise ValueError(
            f"The ratios {settings.ratios!r} of {NAME} have {counts} cells, the prompt has "
            f"{[len(row) for row in cells]}; make them agree."
        )
    placed = []
    for (top, bottom), row, (_, parts) in zip(_spans([first for first, _ in groups]), cells, groups, strict=True):
        for (left, right), words in zip(_spans(parts), row, strict=True):
            box = box_of((left, top, right - left, bottom - top))
            placed.append((words, _turn(box) if turned else box))
    return placed


def _arranged(texts: list[str], ratios: str, turned: bool) -> list[list[str]]:
    """Arrange texts between BREAK as the ratios say: one line of cells, or a group after the other."""
    if ";" not in ratios:
        return [texts]
    cells = []
    for group in (_flipped(ratios) if turned else ratios).split(";"):
        count = max(1, group.count(","))
        cells.append(texts[:count])
        texts = texts[count:]
    return [*cells, *([texts] if texts else [])]


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"The ratio {shown(text)} of {NAME} is not a positive number; correct it.")
    return value


def _spans(parts: Sequence[float]) -> list[tuple[float, float]]:
    ends = np.cumsum([0.0, *parts]) / sum(parts)
    return [(float(first), float(last)) for first, last in pairwise(ends)]


def _matrix(boxes: Sequence[Box]) -> list[list[Box]] | None:
    """Return the boxes as rows of columns that fill the image, or None if they are not."""
    ordered = sorted(boxes, key=lambda box: (box[1], box[0]))
    rows = [list(row) for _, row in groupby(ordered, key=lambda box: (box[1], box[3]))]
    heights = [(row[0][1], row[0][3]) for row in rows]
    widths = [[(box[0], box[2]) for box in row] for row in rows]
    return rows if all(map(_fills, [heights, *widths])) else None


def _fills(spans: Sequence[tuple[float, float]]) -> bool:
    near = all(abs(first[1] - second[0]) < 1e-6 for first, second in pairwise(spans))
    return bool(spans) and near and abs(spans[0][0]) < 1e-6 and abs(spans[-1][1] - 1) < 1e-6


def _ratios(rows: Sequence[Sequence[Box]], turned: bool) -> str:
    """Return the ratios of rows of columns: of each row its height, and the widths in it. A single row is not named."""
    if len(rows) == 1:
        return ",".join(decimal(box[2] - box[0]) for box in rows[0])
    groups = [[row[0][3] - row[0][1], *(box[2] - box[0] for box in row)] for row in rows]
    ratios = ";".join(",".join(map(decimal, group)) for group in groups)
    return _flipped(ratios) if turned else ratios


def _turn(box: Box) -> Box:
    return box[1], box[0], box[3], box[2]


def _flipped(ratios: str) -> str:
    return ratios.translate(str.maketrans(",;", ";,"))
