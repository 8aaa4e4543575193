"""The canvas of the studio: one component for regions, as boxes or brushed masks, over a photo or a result.

It is written for this page (``canvas_*.js``), needs nothing from elsewhere, and sends a :func:`scene` as JSON. What
arrives is whatever a program sends, so the handlers read it by :mod:`localctl.studio.limits`.
"""

from __future__ import annotations

import base64
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
from PIL import Image

from localctl.studio.theme import COLORS

_SCRIPTS = ("canvas_scene.js", "canvas_view.js", "canvas_input.js", "canvas_rows.js")
_TEMPLATE = '<div class="scene"></div>'
_MAX_BACKGROUND = 1024  # pixels of its longer side


def canvas(
    size: tuple[int, int],
    *,
    regions: Sequence[Mapping[str, Any]] = (),
    tools: Sequence[str] = ("select", "box", "brush", "erase"),
    rows: bool = True,
    fixed: bool = False,
    sized: bool = True,
    hint: str = "",
    **options: Any,
) -> Any:
    """Return the component; ``input`` is its event for what the user does.

    Args:
        size: (height, width) in pixels.
        regions: those at the start, as in :func:`scene`.
        tools: among select, box, brush and erase; the first but select is chosen.
        rows: whether phrases and strengths are asked for below.
        fixed: whether the regions stay these ones, so that only their masks are painted: no boxes to move, no new ones.
        sized: whether the size can be changed.
        hint: what the empty canvas says.
        options: arguments of ``gr.HTML``.
    """
    folder = files("localctl.studio")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    # In the script, as an update before the component is mounted, in a tab that is not open yet, loses its properties.
    setup = {"colors": COLORS, "tools": tools, "rows": rows, "fixed": fixed, "size": sized, "hint": hint}
    return gr.HTML(
        scene(size, regions),
        html_template=_TEMPLATE,
        js_on_load=f"const setup = {json.dumps(setup)};\n{script}",
        apply_default_css=False,
        marks={},
        background="",
        shape={},
        **options,
    )


def scene(size: tuple[int, int], regions: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return a value of the canvas.

    regions: each with ``id``, ``color`` (an index), ``phrase``, and ``box`` (xyxy in [0, 1]) or ``mask`` (data URL of
    a PNG, white inside), and the settings of :class:`localctl.layout.Region`; what is missing has its default.
    """
    numbered = [{"id": f"r{index + 1}", "color": index % len(COLORS), **region} for index, region in enumerate(regions)]
    return {"width": size[1], "height": size[0], "regions": numbered}


def data_url(image: Image.Image, longest: int | None = None) -> str:
    """Return an image as text that a page can show: a PNG for a mask (mode L), else a WebP.

    longest: its longer side in pixels, to which a larger one is reduced.
    """
    if longest is not None and max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest))
    kind = "png" if image.mode == "L" else "webp"
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def show_behind(image: Image.Image | None) -> Any:
    """Return the update that shows an image, or none, behind the regions."""
    return gr.update(background="" if image is None else data_url(image.convert("RGB"), _MAX_BACKGROUND))


def show_shape(size: tuple[int, int], regions: Sequence[Mapping[str, Any]]) -> Any:
    """Return the update that gives the canvas another size, and as many regions as ``regions``; what is painted stays.

    regions: those to add where there are fewer.
    """
    shape = {"height": size[0], "width": size[1], "regions": list(regions), "id": uuid.uuid4().hex}
    return gr.update(shape=shape)  # with an id: the same shape acts again, after the canvas has had another
