"""The tab Place: regions on a canvas, a phrase for each, and the images that follow them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from localctl.bases import SIGMAS
from localctl.control.presets import CONTROLS, NONE, control_names
from localctl.studio import progress
from localctl.studio.addon_fields import add_fields as add_addons
from localctl.studio.addon_fields import photos_of
from localctl.studio.canvas import canvas
from localctl.studio.latest import CHOSEN, PRIVATE, on_latest
from localctl.studio.methods import COMPARED_LABELS, KEY, METHODS, TITLES, Setting, presets_of, settings_of
from localctl.studio.place_actions import PlaceHandlers, behind, unreadable
from localctl.studio.place_examples import examples
from localctl.studio.place_form import PHOTO_USES, sweepable
from localctl.studio.shared_fields import PLAIN, Tab, add_guidance, add_job_row, add_seed_row
from localctl.studio.shared_form import AUTO
from localctl.studio.studio import Studio
from localctl.studio.uploads import check_photo, photo, unreadable_form


@dataclass
class PlaceTab(Tab):
    """The tab's components; ``groups``: the settings of its methods, by control."""

    groups: dict[str, Any] = field(default_factory=dict)
    prompt_view: Any = None
    examples: dict[str, Any] = field(default_factory=dict)
    handlers: Any = None

    @property
    def outputs(self) -> list[Any]:
        """The components that :func:`localctl.studio.place_actions.PlaceHandlers.filled` fills."""
        return [*self.fields.values(), *self.groups.values()]


def add(studio: Studio) -> PlaceTab:
    """Add the tab to the page that is being built, and return its components."""
    tab = PlaceTab("place")
    with gr.Row(elem_classes="studio-columns"):
        with gr.Column(scale=6, min_width=320):
            _scene_column(tab, studio)
        with gr.Column(scale=5, min_width=320):
            _result_column(tab)
            _method_fields(tab, studio)
            _sampling_fields(tab, studio)
            _photo_fields(tab)
            add_addons(tab.fields, studio.config, "place")
            _loading_fields(tab)
            _study_fields(tab, studio)
    _connect(tab, studio)
    return tab


def _scene_column(tab: PlaceTab, studio: Studio) -> None:
    tab.fields["prompt"] = gr.Textbox(
        label="Prompt",
        placeholder="Describe the image, or leave this empty: the phrases of the regions are joined.",
        lines=2,
        max_lines=6,
        elem_id="place-prompt",
    )
    tab.prompt_view = gr.HTML("", elem_id="place-prompt-view", **PLAIN)
    tab.fields["scene"] = canvas(
        studio.base_size,
        elem_id="place-canvas",
        elem_classes="studio-plain",
        hint="Drag to place a region, brush its shape, or choose an example",
    )
    with gr.Row(elem_classes="studio-examples"):
        for name in examples(studio.config.base):
            tab.examples[name] = gr.Button(name, size="sm", min_width=90)


def _result_column(tab: PlaceTab) -> None:
    add_job_row(tab, progress.IDLE)
    tab.gallery = gr.Gallery(
        label="Results",
        show_label=False,
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="place-gallery",
    )
    add_seed_row(tab)


def _method_fields(tab: PlaceTab, studio: Studio) -> None:
    first = next(iter(METHODS))
    tab.fields["method"] = gr.Dropdown(_methods(studio), value=first, label="Method", elem_id="place-method")
    values = presets_of(METHODS[first], studio.config.base)
    for control in CONTROLS:
        settings = settings_of(control)
        shown = control in control_names(METHODS[first])
        with gr.Column(visible=shown, elem_classes="studio-group") as group:
            if control != METHODS[first]:
                gr.Markdown(TITLES[control], elem_classes="studio-subtitle")
            for setting in settings[: len(KEY[control])]:
                _setting(tab, setting, values, studio)
            with gr.Accordion("All settings", open=False):
                for setting in settings[len(KEY[control]) :]:
                    _setting(tab, setting, values, studio)
        tab.groups[control] = group


def _methods(studio: Studio) -> list[str]:
    """Return what the page calls the methods that the base takes: weights are optimised through DDIM or PNDM."""
    flow = studio.abilities is not None and studio.abilities.is_flow
    return [label for label, name in METHODS.items() if not (flow and name == "spacetime_optimized")]


def _setting(tab: PlaceTab, setting: Setting, values: dict[str, Any], studio: Studio) -> None:
    control = setting.name.partition(".")[0]
    usual = presets_of(control, studio.config.base)[setting.name]
    tab.fields[setting.name] = setting.component(values.get(setting.name, usual))


def _sampling_fields(tab: PlaceTab, studio: Studio) -> None:
    shown = studio.offers
    with gr.Accordion("Sampling", open=False):
        add_guidance(tab, studio, "method")
        with gr.Row():
            tab.fields["scheduler"] = gr.Dropdown([AUTO, *studio.schedulers], value=AUTO, label="Scheduler")
            tab.fields["sigmas"] = gr.Dropdown([AUTO, *SIGMAS], value=AUTO, label="Noise levels")
            tab.fields["overlap"] = gr.Dropdown(
                ["share", "first", "last", "smallest"], value="share", label="Where regions overlap"
            )
        with gr.Row():
            tab.fields["guidance_rescale"] = gr.Slider(
                0, 1, value=0, step=0.05, label="Guidance rescale", visible=shown("guidance_rescale")
            )
            tab.fields["clip_skip"] = gr.Slider(0, 12, value=0, step=1, label="CLIP skip", visible=shown("clip_skip"))
        with gr.Row():
            tab.fields["upscale"] = gr.Slider(
                1, 4, value=1, step=0.25, label="Second pass, times the size (1: none)", buttons=[]
            )
            tab.fields["upscale_strength"] = gr.Slider(
                0, 1, value=0.5, step=0.05, label="How much it changes", buttons=[]
            )


def _photo_fields(tab: PlaceTab) -> None:
    with gr.Accordion("Photo", open=False):
        tab.fields["photo"] = photo("Photo", elem_id="place-photo", height=220)
        tab.fields["photo_use"] = gr.Radio(list(PHOTO_USES), value=next(iter(PHOTO_USES)), label="Use it")
        tab.fields["photo_strength"] = gr.Slider(
            0, 1, value=0.7, step=0.05, label="How much of it changes", elem_id="place-photo-strength"
        )


def _loading_fields(tab: PlaceTab) -> None:
    with gr.Accordion("Load a layout", open=False, elem_id="place-load"):
        with gr.Row():
            tab.files["layout"] = gr.UploadButton(
                "Open a layout (JSON)", file_types=[".json"], type="binary", size="sm", elem_id="place-layout"
            )
            tab.files["colors"] = gr.UploadButton(
                "Open a colour map (image)",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                type="binary",
                size="sm",
                elem_id="place-colors",
            )
            tab.buttons["predict"] = gr.Button("Predict from the prompt", size="sm", elem_id="place-predict")
        with gr.Row():
            tab.buttons["behind"] = gr.Button("Last result behind the regions", size="sm")
            tab.buttons["clear"] = gr.Button("Start anew", size="sm", elem_id="place-clear")


def _study_fields(tab: PlaceTab, studio: Studio) -> None:
    with gr.Accordion("Compare and look inside", open=False):
        tab.fields["heat"] = gr.Checkbox(value=False, label="Heat map of each phrase, with the images")
        tab.fields["compared"] = gr.Dropdown(
            _methods(studio),
            value=COMPARED_LABELS,
            multiselect=True,
            label="Methods to compare",
            elem_id="place-compared",
        )
        tab.buttons["compare"] = gr.Button("Compare them on these seeds", size="sm", elem_id="place-compare")
        known = sweepable(METHODS[next(iter(METHODS))])
        with gr.Row():
            tab.fields["sweep_column"] = gr.Dropdown(known, value=known[0], label="Columns")
            tab.fields["sweep_columns"] = gr.Textbox("0, 1, 2", label="Values", max_lines=1)
        with gr.Row():
            tab.fields["sweep_row"] = gr.Dropdown([*known, NONE], value=known[1], label="Rows")
            tab.fields["sweep_rows"] = gr.Textbox("0, 2", label="Values", max_lines=1)
        tab.buttons["sweep"] = gr.Button("Sweep", size="sm", elem_id="place-sweep")


def _connect(tab: PlaceTab, studio: Studio) -> None:
    """Connect the components to the handlers."""
    tab.handlers = PlaceHandlers(studio, tab.names, list(tab.groups))
    inputs = list(tab.fields.values())
    for button, kind in (("generate", "images"), ("compare", "compare"), ("sweep", "sweep")):
        asked = tab.buttons[button].click(tab.handlers.generate(kind), inputs, [tab.progress, tab.gallery], **PRIVATE)
        asked.failure(unreadable_form, None, tab.progress, **PRIVATE)
        tab.jobs.append(asked)
    tab.buttons["cancel"].click(tab.handlers.cancel, None, None, queue=False, **PRIVATE)
    _connect_scene(tab, tab.handlers)


def _connect_scene(tab: PlaceTab, handlers: PlaceHandlers) -> None:
    fields = tab.fields
    looked: list[Any] = [fields["prompt"], fields["scene"]]
    quick: dict[str, Any] = {**PRIVATE, "trigger_mode": "always_last", "queue": False}
    # Also what an example or a file has put there: the marks have one writer.
    marks = [tab.prompt_view, fields["scene"]]
    on_latest([fields["prompt"].change, fields["scene"].change], handlers.look, looked, marks)
    shown = [*(fields[name] for name in handlers.of_method), *tab.groups.values()]
    fields["method"].input(handlers.choose_method, fields["method"], shown, **quick)
    for name in photos_of(fields):
        read, told = (behind, [fields["scene"], tab.progress]) if name == "photo" else (check_photo, [tab.progress])
        checked = on_latest([fields[name].change], read, [fields[name]], told)
        checked.failure(unreadable, None, [tab.progress, fields[name]], **PRIVATE)
    loaded = [*looked, tab.progress]
    for name, load in (("layout", handlers.load_json), ("colors", handlers.load_colors)):
        tab.files[name].upload(load, [tab.files[name], *looked], loaded, **CHOSEN)
    for name, button in tab.examples.items():
        button.click(handlers.load_example, [gr.State(name), *looked], loaded, **CHOSEN)
    tab.buttons["predict"].click(handlers.predict, [*looked, fields["seed"]], loaded, **CHOSEN)
    tab.buttons["behind"].click(handlers.last_behind, None, fields["scene"], **CHOSEN)
    tab.buttons["clear"].click(handlers.clear, looked, loaded, **CHOSEN)
