"""The tab Place: regions on a canvas, a phrase for each, and the images that follow them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from localctl.bases import SIGMAS
from localctl.control.presets import CONTROLS, NONE, control_names
from localctl.studio import place_actions as actions
from localctl.studio import progress
from localctl.studio.addon_fields import add_fields as add_addons
from localctl.studio.addon_fields import photos_of
from localctl.studio.canvas import canvas
from localctl.studio.latest import CHOSEN, on_latest
from localctl.studio.limits import MAX_STEPS
from localctl.studio.methods import COMPARED_LABELS, KEY, METHODS, TITLES, Setting, presets_of, settings_of
from localctl.studio.place_examples import examples
from localctl.studio.place_form import AUTO, PHOTO_USES, TRUE_CFG, sweepable
from localctl.studio.seeds import add_seed_row
from localctl.studio.studio import Studio
from localctl.studio.uploads import check_photo, photo, unreadable_form

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass
class PlaceTab:
    """The tab's components: ``fields`` by name, those that make up its state, and what shows results.

    jobs: the events that generate images.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    prompt_view: Any = None
    progress: Any = None
    gallery: Any = None
    jobs: list[Any] = field(default_factory=list)
    buttons: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> list[Any]:
        """The components that :func:`localctl.studio.place_actions.filled` fills."""
        return [*self.fields.values(), *self.groups.values()]

    @property
    def names(self) -> list[str]:
        """The names of the fields, in the order of their components as inputs of a handler."""
        return list(self.fields)


def add(studio: Studio) -> PlaceTab:
    """Add the tab to the page that is being built, and return its components."""
    tab = PlaceTab()
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
    tab.prompt_view = gr.HTML("", elem_id="place-prompt-view", elem_classes="studio-plain", apply_default_css=False)
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
    with gr.Row(elem_classes="studio-actions"):
        tab.buttons["generate"] = gr.Button("Generate", variant="primary", elem_id="place-generate", scale=3)
        tab.buttons["cancel"] = gr.Button("Cancel", elem_id="place-cancel", scale=1, min_width=90)
    tab.progress = gr.HTML(
        progress.IDLE, elem_id="place-progress", elem_classes="studio-plain", apply_default_css=False
    )
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
    add_seed_row(tab.fields, "place")


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
        tab.fields["negative_prompt"] = gr.Textbox(
            label="Negative prompt", max_lines=2, visible=shown("negative_prompt")
        )
        with gr.Row():
            tab.fields["steps"] = gr.Slider(1, MAX_STEPS, value=30, step=1, label="Steps", elem_id="place-steps")
            tab.fields["guidance_scale"] = gr.Textbox(
                label="Guidance scale",
                placeholder="auto: what suits the method",
                max_lines=1,
                visible=shown("guidance_scale"),
            )
            tab.fields["true_cfg_scale"] = gr.Textbox(
                label=TRUE_CFG, placeholder="auto: what suits the base", max_lines=1, visible=shown("true_cfg_scale")
            )
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
            tab.files["layout"] = gr.UploadButton("Layout (JSON)", file_types=[".json"], type="binary", size="sm")
            tab.files["colors"] = gr.UploadButton(
                "Colour map (image)", file_types=[".png", ".jpg", ".jpeg", ".webp"], type="binary", size="sm"
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
    names, inputs = tab.names, list(tab.fields.values())
    results = [tab.progress, tab.gallery]
    for button, kind in (("generate", "images"), ("compare", "compare"), ("sweep", "sweep")):
        asked = tab.buttons[button].click(actions.generate(studio, names, kind), inputs, results, **PRIVATE)
        asked.failure(unreadable_form, None, tab.progress, **PRIVATE)
        tab.jobs.append(asked)
    tab.buttons["cancel"].click(actions.cancel(studio), None, None, queue=False, **PRIVATE)
    _connect_scene(tab, studio)


def _connect_scene(tab: PlaceTab, studio: Studio) -> None:
    fields, base = tab.fields, studio.config.base
    looked: list[Any] = [fields["prompt"], fields["scene"]]
    marks = [tab.prompt_view, fields["scene"]]
    quick: dict[str, Any] = {**PRIVATE, "trigger_mode": "always_last", "queue": False}
    # Also what an example or a file has put there: the marks have one writer.
    on_latest([fields["prompt"].change, fields["scene"].change], actions.look(studio), looked, marks)
    shown = [*(fields[name] for name in actions.method_outputs(tab.names)), *tab.groups.values()]
    fields["method"].input(actions.choose_method(base, tab.names, list(tab.groups)), fields["method"], shown, **quick)
    shown_photo = on_latest(
        [fields["photo"].change], actions.behind, [fields["photo"]], [fields["scene"], tab.progress]
    )
    shown_photo.failure(actions.unreadable, None, [tab.progress, fields["photo"]], **PRIVATE)
    for name in photos_of(fields)[1:]:
        checked = on_latest([fields[name].change], check_photo, [fields[name]], [tab.progress])
        checked.failure(actions.unreadable, None, [tab.progress, fields[name]], **PRIVATE)
    loaded = [*looked, tab.progress]
    for name, load in (("layout", actions.load_json(studio)), ("colors", actions.load_colors(studio))):
        tab.files[name].upload(load, [tab.files[name], *looked], loaded, **CHOSEN)
    for name, button in tab.examples.items():
        button.click(actions.load_example(studio), [gr.State(name), *looked], loaded, **CHOSEN)
    tab.buttons["predict"].click(actions.predict(studio), [*looked, fields["seed"]], loaded, **CHOSEN)
    tab.buttons["behind"].click(actions.last_behind(studio), None, fields["scene"], **CHOSEN)
    tab.buttons["clear"].click(actions.clear(studio), looked, loaded, **CHOSEN)
