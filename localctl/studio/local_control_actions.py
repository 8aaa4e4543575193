"""The handlers of the tab Local control: each reads its fields by :mod:`localctl.studio.limits` and returns what the
page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from localctl.studio.config import StudioConfig
from localctl.studio.handlers import Asked, Handlers, chosen_name
from localctl.studio.jobs_queue import sentence
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
from localctl.studio.place_jobs import Shown
from localctl.studio.sessions import Session
from localctl.studio.uploads import UNREADABLE

NO_CONDITION = '<p class="studio-note">The condition of the photo is shown here as it is extracted.</p>'
_LONGEST = 1024  # pixels of the longer side of what is shown
_MAX_MASK = 10_000_000  # bytes of an uploaded mask


class FollowHandlers(Handlers):
    """The handlers of the tab."""

    def generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Run a job. It yields (progress, figures, gallery)."""

        def ask(session: Session) -> Asked:
            config = self.studio.config
            form = read_form(self.given(values), config)
            folder = session.new_folder()
            settings, found = form_settings(form, config, folder)
            return settings, folder, False, _judged(config, form.order, found, (settings["height"], settings["width"]))

        for told, shown in self.job(request, ask):
            if shown is None:
                yield told, gr.skip(), gr.skip()
            else:
                figures = [item.figures for item in (shown[:1] if told else shown[-1:])]
                yield told or gr.skip(), figures[0] if figures else gr.skip(), _gallery(shown)

    def choose(self, request: gr.Request, event: gr.SelectData) -> Any:
        """Show the figures of the image that is chosen in the gallery."""
        name = chosen_name(event)
        found = self.studio.sessions.of(request).newest(lambda item: item.figures and item.path.name == name)
        return gr.skip() if found is None else found.figures

    def arrange(self, *values: Any) -> list[Any]:
        """Let canvas, conditions, thresholds and rows follow another photo, size or adapter."""
        return self._arranged(self.given(values))

    def change_count(self, change: int) -> Callable[..., list[Any]]:
        """Return the handler that adds an adapter, or removes the last one."""

        def handler(*values: Any) -> list[Any]:
            given = self.given(values)
            scene = given.get("scene") or {}
            if isinstance(scene, Mapping) and isinstance(regions := scene.get("regions", []), list):
                count = min(MOST_ADAPTERS, max(1, len(regions) + change))
                given["scene"] = {**scene, "regions": [*regions, *first_regions(count)[len(regions) :]][:count]}
            return self._arranged(given)  # says what is wrong with another scene

        return handler

    def _arranged(self, given: dict[str, Any]) -> list[Any]:
        """Return the updates of ``FollowTab.arranged``: canvas, conditions, low, high, cells, rows, progress."""
        count = MOST_ADAPTERS
        try:
            scene, config = limits.scene(given["scene"]), self.studio.config
            count = len(scene.regions)
            order = read_order({**given, "low": 0, "high": 0})  # those of the adapters are put in below
            adapters = find_adapters(config, [follow.adapter for follow in order.follows])
            trained = {item.condition.kind: item.condition for item in reversed(adapters) if item.condition}
            canny, palette = trained.get("canny"), trained.get("palette")
            low, high = (canny.low, canny.high) if canny else (USUAL.low, USUAL.high)
            cells = palette.cells if palette else given["cells"]
            shown = [gr.update(visible=canny is not None, value=value) for value in (low, high)]
            shown.append(gr.update(visible=palette is not None, value=cells))
            given = {**given, "low": low, "high": high, "cells": cells}
            size, background, strip = (scene.height, scene.width), "", NO_CONDITION
            if order.photo or order.condition:
                order = read_order(given)
                size = run_size(config, adapters, order)
                background = data_url(scaled(order.source, size), _LONGEST)
                strip = _strip(conditions(order, adapters, size), adapters)
            canvas = {**show_shape(size, first_regions(count)), "background": background}
            return [canvas, strip, *shown, *_rows(count), progress.IDLE]
        except Exception as error:
            return [gr.skip(), NO_CONDITION, *[gr.skip()] * 3, *_rows(count), progress.failed(sentence(error))]

    def extract_again(self, *values: Any) -> tuple[Any, Any]:
        """Extract the conditions with other thresholds: (conditions, progress)."""
        try:
            order = read_order(self.given(values))
            if not (order.photo or order.condition):
                return NO_CONDITION, progress.IDLE
            adapters = find_adapters(self.studio.config, [follow.adapter for follow in order.follows])
            size = run_size(self.studio.config, adapters, order)
            return _strip(conditions(order, adapters, size), adapters), progress.IDLE
        except Exception as error:
            return gr.skip(), progress.failed(sentence(error))

    def load_mask(self, content: Any, *values: Any) -> tuple[Any, Any]:
        """Make an uploaded image the mask of the last adapter: (canvas, progress)."""
        try:
            given = self.given(values)
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

    def refresh_adapters(self, *chosen: Any) -> list[Any]:
        """Look for adapters again."""
        known = list(adapter_places(self.studio.config))
        return [
            gr.update(choices=known, value=name if name in known else known[0] if known else None) for name in chosen
        ]

    def restore(self, memory: Any) -> list[Any]:
        """Put back what the browser remembers; what does not fit is left as it is."""
        nothing = [gr.skip()] * (len(self.names) + MOST_ADAPTERS)
        if not isinstance(memory, Mapping):
            return nothing
        try:
            # Photos are not remembered: one that a page sends here would be a path.
            kept = {"source": PHOTO, **{name: memory[name] for name in self.names if name in memory}}
            count = len(read_form(kept, self.studio.config).order.follows)
        except ValueError as error:
            gr.Warning(f"What the browser remembers cannot be used: {error}")
            return nothing
        known = list(adapter_places(self.studio.config))
        gone = {name for name in memory if name.startswith("adapter") and memory[name] not in known}
        fits = memory.keys() - gone
        updates = [gr.update(value=memory[name]) if name in fits else gr.skip() for name in self.names]
        return [*updates, *_rows(count)]


def _judged(
    config: StudioConfig, order: Order, found: Sequence[Image.Image], size: tuple[int, int]
) -> Callable[[Shown], Shown]:
    """Return what adds to an image of a job how well it follows what it should."""
    adapters = find_adapters(config, [follow.adapter for follow in order.follows])
    labelled = [(_condition_label(adapter), image) for adapter, image in zip(adapters, found, strict=True)]
    target = target_edges(order, adapters, size)
    everywhere = Image.new("L", (size[1], size[0]), 255)
    masks = [follow.mask or everywhere for follow in order.follows]

    def judged(shown: Shown) -> Shown:
        image = load_image(shown.path)
        verdict = None if target is None else judge(image, target, masks)
        return replace(shown, figures=_figures(labelled, image, shown.caption, verdict))

    return judged


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


def _gallery(shown: Sequence[Shown]) -> Any:
    """Return the gallery to choose from; a single image is in the figures already."""
    return gr.update(value=[(str(item.path), item.caption) for item in shown], visible=len(shown) > 1)


def unreadable() -> str:
    """Say that an upload is no image."""
    return progress.failed(UNREADABLE)


def _rows(count: int) -> list[Any]:
    return [gr.update(visible=index < count) for index in range(MOST_ADAPTERS)]


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
