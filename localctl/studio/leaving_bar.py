"""The bar below the tabs: take the last image away, or drop one that was made before to have its settings back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from localctl.studio import limits, place_actions, progress
from localctl.studio.addon_restore import addon_values
from localctl.studio.jobs_queue import sentence
from localctl.studio.latest import CHOSEN
from localctl.studio.leaving import Bundle, bundle_of, settings_of_image
from localctl.studio.local_control import FollowTab
from localctl.studio.local_control_job import MOST_ADAPTERS
from localctl.studio.local_control_restore import follow_values
from localctl.studio.place import PlaceTab
from localctl.studio.place_restore import values_of
from localctl.studio.restoring import check_bounds, seed_values
from localctl.studio.sessions import Session
from localctl.studio.studio import Studio

MAX_PNG = 10_000_000  # bytes of an image that is dropped
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def add(studio: Studio, place: PlaceTab, follow: FollowTab, tabs: Any) -> None:
    """Add the bar to the page that is being built."""
    with gr.Row(elem_id="leaving", elem_classes="studio-leaving"):
        dropped = gr.File(
            label="Drop an image made before",
            file_types=[".png"],
            type="binary",
            height=150,
            scale=2,
            min_width=260,
            elem_id="leaving-drop",
        )
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                buttons = [
                    gr.DownloadButton(label, size="sm", min_width=110, interactive=False, elem_id=f"leaving-{name}")
                    for name, label in (
                        ("png", "Image (PNG)"),
                        ("layout", "Layout (JSON)"),
                        ("zip", "Everything (ZIP)"),
                    )
                ]
            command = gr.Textbox(
                label="The command of the last image, to run where the ZIP was unpacked",
                lines=1,
                max_lines=8,
                interactive=False,
                buttons=["copy"],
                elem_id="leaving-command",
            )
    outputs = [*buttons, command]
    for asked in (*place.jobs, *follow.jobs):
        asked.then(offer(studio), None, outputs, queue=False, **_PRIVATE)
    for gallery in (place.gallery, follow.gallery):
        gallery.select(offer_chosen(studio), None, outputs, **CHOSEN)
    filled = [tabs, *place.outputs, *follow.fields.values(), *follow.rows, place.progress, follow.progress]
    dropped.upload(take_back(studio, place, follow), dropped, filled, **_PRIVATE)


def offer(studio: Studio) -> Callable[..., list[Any]]:
    """Return the handler that offers the last image of a tab."""

    def handler(request: gr.Request) -> list[Any]:
        session = studio.sessions.of(request)
        last = next((item for item in reversed(session.results.values()) if item.kind == "image"), None)
        return _offered(session, None if last is None else last.path)

    return handler


def offer_chosen(studio: Studio) -> Callable[..., list[Any]]:
    """Return the handler that offers the image that is chosen in a gallery."""

    def handler(request: gr.Request, event: gr.SelectData) -> list[Any]:
        session = studio.sessions.of(request)
        image = (event.value or {}).get("image", {}) if isinstance(event.value, dict) else {}
        name = str(image.get("orig_name", ""))
        found = next((item for item in reversed(session.results.values()) if item.path.name == name), None)
        return [gr.skip()] * 4 if found is None else _offered(session, found.path)

    return handler


def _offered(session: Session, path: Path | None) -> list[Any]:
    """Return the updates of the three buttons and of the command."""
    if path is None:
        return [gr.skip()] * 4
    try:
        found: Bundle = bundle_of(path, path.with_suffix(""))
    except (ValueError, OSError) as error:
        return [*[gr.update(value=None, interactive=False)] * 3, sentence(error)]
    files = (found.image, found.layout, found.bundle)
    buttons = [gr.update(value=file and str(file), interactive=file is not None) for file in files]
    return [*buttons, found.command]


def take_back(studio: Studio, place: PlaceTab, follow: FollowTab) -> Callable[..., list[Any]]:
    """Return the handler for an image that is dropped: it fills the tab that made it, and opens that."""
    names, groups = place.names, list(place.groups)

    def handler(request: gr.Request, content: Any) -> list[Any]:
        nothing_placed = place_actions.filled(studio, names, groups, {})
        nothing_followed = [gr.skip()] * (len(follow.fields) + MOST_ADAPTERS)
        told = [gr.skip(), gr.skip()]
        try:
            folder = studio.sessions.of(request).new_folder()
            options = settings_of_image(limits.upload("The image", content, MAX_PNG), folder)
            back = _back(options)
            if options.get("adapter"):
                values = follow_values(options, studio.config)
                check_bounds(values, follow.fields)
                count = len(options["adapter"])
                updates = [gr.update(value=values[name]) if name in values else gr.skip() for name in follow.names]
                rows = [gr.update(visible=index < count) for index in range(MOST_ADAPTERS)]
                told[1] = progress.done(back)
                return [gr.update(selected="local_control"), *nothing_placed, *updates, *rows, *told]
            values = values_of(options, studio.config.base, studio.base_size) | addon_values(options, studio.config)
            check_bounds(values, place.fields)
            told[0] = progress.done(back)
            placed = place_actions.filled(studio, names, groups, values)
            return [gr.update(selected="place"), *placed, *nothing_followed, *told]
        except Exception as error:  # of whatever file was dropped; a bug is in the log
            failed = progress.failed(sentence(error))
            return [gr.skip(), *nothing_placed, *nothing_followed, failed, failed]

    return handler


def _back(options: Mapping[str, Any]) -> str:
    """Return what to tell of an image whose settings are back."""
    text = "The settings of the image are back."
    for name, button in (("sweep", "Sweep"), ("compare", "Compare them on these seeds")):
        if options.get(name):
            text += f" It is one of several: {button!r}, under 'Compare and look inside', makes them all again."
    return " ".join(filter(None, (text, seed_values(options)[1])))
