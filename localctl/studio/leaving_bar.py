"""The bar below the tabs: take the last image away, or drop one that was made before to have its settings back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from localctl.studio import limits, progress
from localctl.studio.addon_restore import addon_values
from localctl.studio.handlers import chosen_name
from localctl.studio.jobs_queue import sentence
from localctl.studio.latest import CHOSEN, PRIVATE
from localctl.studio.leaving import Bundle, bundle_of, settings_of_image
from localctl.studio.local_control import FollowTab
from localctl.studio.local_control_job import MOST_ADAPTERS
from localctl.studio.local_control_restore import follow_values
from localctl.studio.place import PlaceTab
from localctl.studio.place_jobs import Shown
from localctl.studio.place_restore import values_of
from localctl.studio.restoring import check_bounds, seed_values
from localctl.studio.studio import Studio

MAX_PNG = 10_000_000  # bytes of an image that is dropped


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
    bar = _Bar(studio, place, follow)
    for asked in (*place.jobs, *follow.jobs):
        asked.then(bar.offer, None, outputs, queue=False, **PRIVATE)
    for gallery in (place.gallery, follow.gallery):
        gallery.select(bar.offer_chosen, None, outputs, **CHOSEN)
    filled = [tabs, *place.outputs, *follow.fields.values(), *follow.rows, place.progress, follow.progress]
    dropped.upload(bar.take_back, dropped, filled, **PRIVATE)


class _Bar:
    """The handlers of the bar."""

    def __init__(self, studio: Studio, place: PlaceTab, follow: FollowTab) -> None:
        self.studio, self.place, self.follow = studio, place, follow

    def offer(self, request: gr.Request) -> list[Any]:
        """Offer the last image of a browser's tab."""
        return _offered(self.studio.sessions.of(request).newest(lambda item: item.kind == "image"))

    def offer_chosen(self, request: gr.Request, event: gr.SelectData) -> list[Any]:
        """Offer the image that is chosen in a gallery."""
        name = chosen_name(event)
        return _offered(self.studio.sessions.of(request).newest(lambda item: item.path.name == name))

    def take_back(self, request: gr.Request, content: Any) -> list[Any]:
        """Fill the tab that made an image which is dropped, and open it."""
        studio, fields = self.studio, self.follow.fields
        nothing_placed = self.place.handlers.filled({})
        nothing_followed = [gr.skip()] * (len(fields) + MOST_ADAPTERS)
        told = [gr.skip(), gr.skip()]
        try:
            folder = studio.sessions.of(request).new_folder()
            options = settings_of_image(limits.upload("The image", content, MAX_PNG), folder)
            back = _back(options)
            if options.get("adapter"):
                values = follow_values(options, studio.config)
                check_bounds(values, fields)
                count = len(options["adapter"])
                updates = [gr.update(value=values[name]) if name in values else gr.skip() for name in fields]
                rows = [gr.update(visible=index < count) for index in range(MOST_ADAPTERS)]
                told[1] = progress.done(back)
                return [gr.update(selected="local_control"), *nothing_placed, *updates, *rows, *told]
            values = values_of(options, studio.config.base, studio.base_size) | addon_values(options, studio.config)
            check_bounds(values, self.place.fields)
            told[0] = progress.done(back)
            return [gr.update(selected="place"), *self.place.handlers.filled(values), *nothing_followed, *told]
        except Exception as error:  # of whatever file was dropped; a bug is in the log
            failed = progress.failed(sentence(error))
            return [gr.skip(), *nothing_placed, *nothing_followed, failed, failed]


def _offered(shown: Shown | None) -> list[Any]:
    """Return the updates of the three buttons and of the command."""
    if shown is None:
        return [gr.skip()] * 4
    try:
        found: Bundle = bundle_of(shown.path, shown.path.with_suffix(""))
    except (ValueError, OSError) as error:
        return [*[gr.update(value=None, interactive=False)] * 3, sentence(error)]
    files = (found.image, found.layout, found.bundle)
    buttons = [gr.update(value=file and str(file), interactive=file is not None) for file in files]
    return [*buttons, found.command]


def _back(options: Mapping[str, Any]) -> str:
    """Return what to tell of an image whose settings are back."""
    text = "The settings of the image are back."
    for name, button in (("sweep", "Sweep"), ("compare", "Compare them on these seeds")):
        if options.get(name):
            text += f" It is one of several: {button!r}, under 'Compare and look inside', makes them all again."
    return " ".join(filter(None, (text, seed_values(options)[1])))
