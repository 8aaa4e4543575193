"""The tab Local control: follow a photo's condition inside painted masks, with one adapter or several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from localctl.studio import local_control_actions as actions
from localctl.studio.addon_fields import add_fields, photos_of
from localctl.studio.canvas import canvas
from localctl.studio.latest import CHOSEN, PRIVATE, on_latest
from localctl.studio.local_control_actions import FollowHandlers
from localctl.studio.local_control_form import PHOTO, PLACES, SOURCES, first_regions
from localctl.studio.local_control_job import MOST_ADAPTERS, adapter_places
from localctl.studio.shared_fields import PLAIN, Tab, add_guidance, add_job_row, add_seed_row, optional_number
from localctl.studio.shared_form import AUTO
from localctl.studio.studio import Studio
from localctl.studio.uploads import check_photo, photo, unreadable_form

_HINT = "Upload a photo, or choose an example"
_CHOOSE = """element.addEventListener('click', (event) => {
  const chosen = event.target.closest('button');
  if (chosen) trigger('select', { index: Number(chosen.dataset.index) });
});"""
_PAINT = (
    "Paint where the photo is followed. Without a mask it is followed everywhere; outside the mask the prompt alone "
    "decides."
)


@dataclass
class FollowTab(Tab):
    """The tab's components; ``rows``: those of its adapters."""

    rows: list[Any] = field(default_factory=list)
    conditions: Any = None
    figures: Any = None

    @property
    def adapters(self) -> list[Any]:
        """The dropdowns of adapters."""
        return [self.fields[f"adapter{number}"] for number in range(1, MOST_ADAPTERS + 1)]

    @property
    def arranged(self) -> list[Any]:
        """The components that :func:`localctl.studio.local_control_actions.FollowHandlers.arrange` fills."""
        thresholds = [self.fields[name] for name in ("low", "high", "cells")]
        return [self.fields["scene"], self.conditions, *thresholds, *self.rows, self.progress]


def add(studio: Studio) -> FollowTab:
    """Add the tab to the page that is being built, and return its components."""
    tab = FollowTab("follow")
    with gr.Row(elem_classes="studio-columns"):
        with gr.Column(scale=6, min_width=320):
            _photo_column(tab, studio)
        with gr.Column(scale=5, min_width=320):
            _result_column(tab)
            _adapter_rows(tab, studio)
            _condition_fields(tab)
            _sampling_fields(tab, studio)
            add_fields(tab.fields, studio.config, "follow", PLACES)
    _connect(tab, studio)
    return tab


def _photo_column(tab: FollowTab, studio: Studio) -> None:
    tab.fields["prompt"] = gr.Textbox(
        label="Prompt", placeholder="Describe the image.", lines=2, max_lines=6, elem_id="follow-prompt"
    )
    with gr.Row(elem_classes="follow-photos"):
        tab.fields["photo"] = photo("Photo", elem_id="follow-photo", height=190, min_width=170, scale=2)
        with gr.Column(scale=3, min_width=220):
            tab.files["example"] = gr.HTML(
                actions.example_buttons(), js_on_load=_CHOOSE, elem_id="follow-examples", apply_default_css=False
            )
            tab.fields["source"] = gr.Radio(
                list(SOURCES), value=PHOTO, label="The image is", container=False, elem_id="follow-source"
            )
            tab.files["mask"] = gr.UploadButton(
                "Upload the mask instead of painting it", file_types=[".png", ".jpg", ".jpeg", ".webp"], type="binary",
                size="sm", elem_id="follow-mask",
            )  # fmt: skip
    tab.fields["scene"] = canvas(
        studio.base_size,
        regions=first_regions(1),
        tools=("brush", "erase", "box"),
        rows=False,
        fixed=True,
        sized=False,
        hint=_HINT,
        elem_id="follow-canvas",
        elem_classes="studio-plain",
    )
    gr.HTML(f'<p class="studio-note">{_PAINT}</p>', elem_classes="studio-plain", apply_default_css=False)


def _result_column(tab: FollowTab) -> None:
    add_job_row(tab)
    tab.figures = gr.HTML("", elem_id="follow-figures", **PLAIN)
    tab.gallery = gr.Gallery(
        label="Results",
        show_label=False,
        visible=False,
        columns=4,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=["fullscreen"],
        elem_id="follow-gallery",
    )
    add_seed_row(tab)


def _adapter_rows(tab: FollowTab, studio: Studio) -> None:
    known = list(adapter_places(studio.config))
    for number in range(1, MOST_ADAPTERS + 1):
        with gr.Column(visible=number == 1, elem_classes="studio-group") as row:
            tab.fields[f"adapter{number}"] = gr.Dropdown(
                known, value=known[0] if known else None, label=f"Adapter {number}", elem_id=f"follow-adapter{number}"
            )
            with gr.Row():
                for name, label, value, most in (
                    ("weight", "Strength", 1, 2), ("start", "Start", 0, 1), ("end", "End", 1, 1),
                ):  # fmt: skip
                    tab.fields[f"{name}{number}"] = gr.Slider(
                        0,
                        most,
                        value=value,
                        step=0.05,
                        label=label,
                        min_width=110,
                        elem_id=f"follow-{name}{number}",
                        buttons=[],
                    )
        tab.rows.append(row)
    with gr.Row():
        tab.buttons["more"] = gr.Button("Add an adapter", size="sm", elem_id="follow-more")
        tab.buttons["fewer"] = gr.Button("Remove the last", size="sm", elem_id="follow-fewer")
        tab.buttons["refresh"] = gr.Button("Look for new adapters", size="sm")


def _condition_fields(tab: FollowTab) -> None:
    with gr.Accordion("Condition", open=True):
        tab.conditions = gr.HTML(actions.NO_CONDITION, elem_id="follow-conditions")
        with gr.Row():
            tab.fields["low"] = gr.Slider(0, 400, value=50, step=5, label="Low threshold", elem_id="follow-low")
            tab.fields["high"] = gr.Slider(0, 400, value=100, step=5, label="High threshold", elem_id="follow-high")
        tab.fields["cells"] = gr.Slider(
            2, 32, value=8, step=1, label="Colours per side", visible=False, elem_id="follow-cells"
        )


def _sampling_fields(tab: FollowTab, studio: Studio) -> None:
    shown = studio.offers
    with gr.Accordion("Sampling", open=False):
        add_guidance(tab, studio, "base")
        with gr.Row():
            tab.fields["scheduler"] = gr.Dropdown([AUTO, *studio.schedulers], value=AUTO, label="Scheduler")
            tab.fields["width"] = optional_number(tab, "Width", "as the photo")
            tab.fields["height"] = optional_number(tab, "Height", "as the photo")
        with gr.Row():
            tab.fields["unconditional_scale"] = optional_number(
                tab, "Control beside the negative", "auto: the adapter's own", shown("unconditional_scale")
            )
            tab.fields["control_guidance_scale"] = optional_number(
                tab, "Guidance scale of the control", "none of its own", shown("control_guidance_scale")
            )


def _connect(tab: FollowTab, studio: Studio) -> None:
    """Connect the components to the handlers."""
    handlers = FollowHandlers(studio, tab.names)
    inputs = list(tab.fields.values())
    results = [tab.progress, tab.figures, tab.gallery]
    asked = tab.buttons["generate"].click(handlers.generate, inputs, results, **PRIVATE)
    asked.failure(unreadable_form, None, tab.progress, **PRIVATE)
    tab.jobs.append(asked)
    tab.buttons["cancel"].click(handlers.cancel, None, None, queue=False, **PRIVATE)
    tab.gallery.select(handlers.choose, None, tab.figures, **CHOSEN)
    arranging = [tab.fields["photo"].change, *(adapter.input for adapter in tab.adapters)]
    arranging += [tab.fields[name].input for name in ("source", "width", "height")]
    arranged = on_latest(arranging, handlers.arrange, inputs, tab.arranged)
    arranged.failure(actions.unreadable, None, tab.progress, **PRIVATE)
    for name in photos_of(tab.fields)[1:]:
        checked = on_latest([tab.fields[name].change], check_photo, [tab.fields[name]], [tab.progress])
        checked.failure(actions.unreadable, None, tab.progress, **PRIVATE)
    for name, change in (("more", 1), ("fewer", -1)):
        on_latest([tab.buttons[name].click], handlers.change_count(change), inputs, tab.arranged)
    thresholds = [tab.fields[name] for name in ("low", "high", "cells")]
    moved, shown = [part.input for part in thresholds], [tab.conditions, tab.progress]
    on_latest(moved, handlers.extract_again, inputs, shown, chosen=thresholds)
    tab.files["example"].select(actions.choose_example, None, [tab.fields["photo"], tab.fields["prompt"]], **CHOSEN)
    painted = [tab.fields["scene"], tab.progress]
    tab.files["mask"].upload(handlers.load_mask, [tab.files["mask"], *inputs], painted, **PRIVATE)
    tab.buttons["refresh"].click(handlers.refresh_adapters, tab.adapters, tab.adapters, queue=False, **PRIVATE)
