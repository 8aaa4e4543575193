"""The handlers of the tab Local control: each reads its fields by :mod:`localctl.studio.limits` and returns what the
page shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from localctl.adapter_files import SavedAdapter
from localctl.drawing import EDGE_COLORS
from localctl.images import load_image, open_gray
from localctl.studio import limits, progress
from localctl.studio.canvas import data_url, show_shape
from localctl.studio.canvas import scene as canvas_value
from localctl.studio.jobs_queue import Made, Stopped, Waiting, sentence
from localctl.studio.local_control_examples import examples
from localctl.studio.local_control_form import PHOTO, USUAL, first_regions, form_settings, read_form, read_order
from localctl.studio.local_control_job import (
    MOST_ADAPTERS,
    Order,
    Verdict,
    adapter_places,
    conditions,
    find_adapters,
    judge,
    run_size,
    scaled,
    target_edges,
)
from localctl.studio.place_jobs import Note, Shown, Step, run_job
from localctl.studio.studio import Studio
from localctl.studio.uploads import UNREADABLE

NO_CONDITION = '<p class="studio-note">The condition of the photo is shown here as it is extracted.</p>'
_LONGEST = 1024  # pixels of the longer side of what is shown
_MAX_MASK = 10_000_000  # bytes of an uploaded mask


@dataclass(frozen=True)
class Followed(Shown):
    """An image for the gallery, and what is shown of it: condition, result and edges as HTML."""

    figures: str = ""


def generate(studio: Studio, names: Sequence[str]) -> Callable[..., Iterator[tuple[Any, Any, Any]]]:
    """Return the handler of a job. It yields (progress, figures, gallery)."""

    def handler(request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any, Any]]:
        session = studio.sessions.of(request)
        try:
            form = read_form(dict(zip(names, values, strict=True)), studio.config)
            folder = session.new_folder()
            settings, found = form_settings(form, studio.config, folder)
            judged = _Judge(studio, form.order, found, (settings["height"], settings["width"]))
            begun, shown, notes = time.monotonic(), list[Followed](), list[str]()
            for event in studio.run(
                session, lambda report, check: run_job(studio, settings, folder, report, check, heat=False)
            ):
                item = event.item if isinstance(event, Made) else event
                if isinstance(item, Shown):
                    shown.append(judged.followed(item))
                    session.keep(item.path, shown[-1])
                    yield gr.skip(), shown[-1].figures, _gallery(shown)
                elif isinstance(item, Waiting):
                    yield progress.waiting(item.ahead), gr.skip(), gr.skip()
                elif isinstance(item, Step):
                    yield progress.stepping(item.text, item.share, item.previews), gr.skip(), gr.skip()
                elif isinstance(item, Note):
                    notes.append(item.text)
                    yield progress.starting(item.text), gr.skip(), gr.skip()
            kept = [note for note in notes if not note.startswith("Loading")]
            text = f"{len(shown)} image{'s'[: len(shown) - 1]} in {time.monotonic() - begun:.1f} s."
            yield progress.done(" ".join([text, *kept])), shown[0].figures, _gallery(shown)
        except Stopped as stop:
            yield progress.failed(str(stop)), gr.skip(), gr.skip()
        except Exception as error:  # the next job works; a bug is in the log
            yield progress.failed(sentence(error)), gr.skip(), gr.skip()

    return handler


class _Judge:
    """Compares the images of a job with what they should follow."""

    def __init__(self, studio: Studio, order: Order, found: Sequence[Image.Image], size: tuple[int, int]) -> None:
        adapters = find_adapters(studio.config, [follow.adapter for follow in order.follows])
        self.conditions = [(_condition_label(adapter), image) for adapter, image in zip(adapters, found, strict=True)]
        self.target = target_edges(order, adapters, size)
        everywhere = Image.new("L", (size[1], size[0]), 255)
        self.masks = [follow.mask or everywhere for follow in order.follows]

    def followed(self, shown: Shown) -> Followed:
        """Return an image with its figures."""
        image = load_image(shown.path)
        verdict = None if self.target is None else judge(image, self.target, self.masks)
        figures = _figures(self.conditions, image, shown.caption, verdict)
        return Followed(shown.path, shown.caption, shown.kind, shown.lines, figures)


def _figures(
    found: Sequence[tuple[str, Image.Image]], image: Image.Image, caption: str, verdict: Verdict | None
) -> str:
    """Return condition, result and edges side by side, with the scores below them, as HTML."""
    parts = [_figure(item, label) for label, item in found]
    parts.append(_figure(image, f"result, {caption}"))
    if verdict is None:
        text = "No F1: edges are compared with a photo, or with an uploaded edge map."
        return f'<div class="figures">{"".join(parts)}</div><p class="studio-note">{escape(text)}</p>'
    legend = "".join(
        f'<span class="legend"><i style="background:{color}"></i>{name}</span>' for name, color in EDGE_COLORS.items()
    )
    parts.append(_figure(verdict.overlay, "edges", legend))
    parts.append(f'<p class="figures-score">{escape(verdict.text)}</p>')
    return f'<div class="figures">{"".join(parts)}</div>'


def _figure(image: Image.Image, caption: str, below: str = "") -> str:
    text = f"<figcaption>{escape(caption)}{below}</figcaption>"
    return f'<figure><img alt="{escape(caption)}" src="{data_url(image, _LONGEST)}">{text}</figure>'


def _gallery(shown: Sequence[Followed]) -> Any:
    """Return the gallery to choose from; a single image is in the figures already."""
    return gr.update(value=[(str(item.path), item.caption) for item in shown], visible=len(shown) > 1)


def choose(studio: Studio) -> Callable[..., Any]:
    """Return the handler that shows the figures of the image that is chosen in the gallery."""

    def handler(request: gr.Request, event: gr.SelectData) -> Any:
        value = event.value if isinstance(event.value, Mapping) else {}
        name = str((value.get("image") or {}).get("orig_name", ""))
        results = reversed(studio.sessions.of(request).results.values())
        found = next((item for item in results if isinstance(item, Followed) and item.path.name == name), None)
        return gr.skip() if found is None else found.figures

    return handler


def cancel(studio: Studio) -> Callable[..., None]:
    """Return the handler that stops the jobs of a tab."""

    def handler(request: gr.Request) -> None:
        studio.sessions.of(request).cancel()

    return handler


def unreadable() -> str:
    """Say that an upload is no image."""
    return progress.failed(UNREADABLE)


def arrange(studio: Studio, names: Sequence[str]) -> Callable[..., list[Any]]:
    """Return the handler for another photo, size or adapter: canvas, conditions, thresholds and rows follow it."""

    def handler(*values: Any) -> list[Any]:
        return _arranged(studio, dict(zip(names, values, strict=True)))

    return handler


def change_count(studio: Studio, names: Sequence[str], change: int) -> Callable[..., list[Any]]:
    """Return the handler that adds an adapter, or removes the last one."""

    def handler(*values: Any) -> list[Any]:
        given = dict(zip(names, values, strict=True))
        scene = given.get("scene") or {}
        if isinstance(scene, Mapping) and isinstance(regions := scene.get("regions", []), list):
            count = min(MOST_ADAPTERS, max(1, len(regions) + change))
            given["scene"] = {**scene, "regions": [*regions, *first_regions(count)[len(regions) :]][:count]}
        return _arranged(studio, given)  # says what is wrong with another scene

    return handler


def _arranged(studio: Studio, given: dict[str, Any]) -> list[Any]:
    """Return the updates of ``FollowTab.arranged``: canvas, conditions, low, high, cells, rows, progress."""
    count = MOST_ADAPTERS
    try:
        scene = limits.scene(given["scene"])
        count = len(scene.regions)
        order = read_order({**given, "low": 0, "high": 0})  # those of the adapters are put in below
        adapters = find_adapters(studio.config, [follow.adapter for follow in order.follows])
        canny = next((item.condition for item in adapters if item.condition and item.condition.kind == "canny"), None)
        palette = next(
            (item.condition for item in adapters if item.condition and item.condition.kind == "palette"), None
        )
        low, high = (canny.low, canny.high) if canny else (USUAL.low, USUAL.high)
        cells = palette.cells if palette else given["cells"]
        shown = [gr.update(visible=canny is not None, value=value) for value in (low, high)]
        shown.append(gr.update(visible=palette is not None, value=cells))
        given = {**given, "low": low, "high": high, "cells": cells}
        size, background, strip = (scene.height, scene.width), "", NO_CONDITION
        if order.photo or order.condition:
            order = read_order(given)
            size = run_size(studio.config, adapters, order)
            background = data_url(scaled(order.source, size), _LONGEST)
            strip = _strip(conditions(order, adapters, size), adapters)
        canvas = {**show_shape(size, first_regions(count)), "background": background}
        return [canvas, strip, *shown, *_rows(count), progress.IDLE]
    except Exception as error:
        return [gr.skip(), NO_CONDITION, *[gr.skip()] * 3, *_rows(count), progress.failed(sentence(error))]


def _rows(count: int) -> list[Any]:
    return [gr.update(visible=index < count) for index in range(MOST_ADAPTERS)]


def extract_again(studio: Studio, names: Sequence[str]) -> Callable[..., tuple[Any, Any]]:
    """Return the handler for other thresholds: (conditions, progress)."""

    def handler(*values: Any) -> tuple[Any, Any]:
        try:
            order = read_order(dict(zip(names, values, strict=True)))
            if not (order.photo or order.condition):
                return NO_CONDITION, progress.IDLE
            adapters = find_adapters(studio.config, [follow.adapter for follow in order.follows])
            size = run_size(studio.config, adapters, order)
            return _strip(conditions(order, adapters, size), adapters), progress.IDLE
        except Exception as error:
            return gr.skip(), progress.failed(sentence(error))

    return handler


def _strip(found: Sequence[Image.Image], adapters: Sequence[SavedAdapter]) -> str:
    """Return the conditions side by side as HTML; equal ones once."""
    labels = dict(zip(map(_condition_label, adapters), found, strict=True))
    return (
        f'<div class="figures figures-small">{"".join(_figure(image, label) for label, image in labels.items())}</div>'
    )


def _condition_label(adapter: SavedAdapter) -> str:
    return f"condition: {(adapter.condition or USUAL).kind}"


def example_buttons() -> str:
    """Return the examples as buttons, as HTML."""
    parts = [
        f'<button type="button" data-index="{index}" title="{escape(caption)}" aria-label="{escape(caption)}">'
        f'<img alt="" src="{data_url(image)}"></button>'
        for index, (image, caption) in enumerate(examples())
    ]
    return f'<div class="follow-examples">{"".join(parts)}</div>'


def choose_example(event: gr.EventData) -> tuple[Any, Any]:
    """Put an example on the page: (photo, prompt)."""
    found, index = examples(), getattr(event, "index", None)
    if not isinstance(index, int) or not 0 <= index < len(found):
        return gr.skip(), gr.skip()
    return found[index]


def load_mask(studio: Studio, names: Sequence[str]) -> Callable[..., tuple[Any, Any]]:
    """Return the handler that makes an uploaded image the mask of the last adapter: (canvas, progress)."""

    def handler(content: Any, *values: Any) -> tuple[Any, Any]:
        try:
            given = dict(zip(names, values, strict=True))
            scene = limits.scene(given["scene"])
            mask = open_gray(limits.upload("The mask", content, _MAX_MASK), "The mask")
            if not mask.any():
                raise ValueError("The mask is black everywhere; white marks what is controlled.")
            image = Image.fromarray((np.asarray(mask) * 255).round().astype(np.uint8))
            regions = [dict(region) for region in given["scene"]["regions"]]
            regions[-1] |= {"box": None, "mask": data_url(image.resize((scene.width, scene.height)), 512)}
            value = canvas_value((scene.height, scene.width), regions)
            return gr.update(value=value), progress.IDLE
        except Exception as error:
            return gr.skip(), progress.failed(sentence(error))

    return handler


def refresh_adapters(studio: Studio) -> Callable[..., list[Any]]:
    """Return the handler that looks for adapters again."""

    def handler(*chosen: Any) -> list[Any]:
        known = list(adapter_places(studio.config))
        return [
            gr.update(choices=known, value=name if name in known else known[0] if known else None) for name in chosen
        ]

    return handler


def restore(studio: Studio, names: Sequence[str]) -> Callable[[Any], list[Any]]:
    """Return the handler that puts back what the browser remembers; what does not fit is left as it is."""

    def handler(memory: Any) -> list[Any]:
        nothing = [gr.skip()] * (len(names) + MOST_ADAPTERS)
        if not isinstance(memory, Mapping):
            return nothing
        try:
            # Photos are not remembered: one that a page sends here would be a path.
            kept = {"source": PHOTO, **{name: memory[name] for name in names if name in memory}}
            count = len(read_form(kept, studio.config).order.follows)
        except ValueError as error:
            gr.Warning(f"What the browser remembers cannot be used: {error}")
            return nothing
        known = list(adapter_places(studio.config))
        updates = []
        for name in names:
            if name not in memory or (name.startswith("adapter") and memory[name] not in known):
                updates.append(gr.skip())
            else:
                updates.append(gr.update(value=memory[name]))
        return [*updates, *_rows(count)]

    return handler
