"""What both tabs have: their components, the buttons of a job, the rows of seeds and of guidance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from localctl.studio.limits import MAX_IMAGES, MAX_STEPS
from localctl.studio.studio import Studio

TRUE_CFG = "Guidance by the negative prompt (true CFG)"
PLAIN: dict[str, Any] = {"elem_classes": "studio-plain", "apply_default_css": False}  # of gr.HTML
_NEW = "() => String(Math.floor(Math.random() * 2 ** 32))"


@dataclass
class Tab:
    """The tab's components: ``fields`` by name, those that make up its state, and what shows results.

    name: the beginning of their ids. jobs: the events that generate images.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    buttons: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    jobs: list[Any] = field(default_factory=list)
    progress: Any = None
    gallery: Any = None

    @property
    def names(self) -> list[str]:
        """The names of the fields, in the order of their components as inputs of a handler."""
        return list(self.fields)


def add_job_row(tab: Tab, text: str = "") -> None:
    """Add the buttons that begin and stop a job, and what is said of it: ``text`` before the first one."""
    with gr.Row(elem_classes="studio-actions"):
        tab.buttons["generate"] = gr.Button("Generate", variant="primary", elem_id=f"{tab.name}-generate", scale=3)
        tab.buttons["cancel"] = gr.Button("Cancel", elem_id=f"{tab.name}-cancel", scale=1, min_width=90)
    tab.progress = gr.HTML(text, elem_id=f"{tab.name}-progress", **PLAIN)


def add_seed_row(tab: Tab) -> None:
    """Add how many images are generated, and from which seed."""
    with gr.Row(elem_classes="studio-seeds"):
        tab.fields["images"] = gr.Slider(
            1, MAX_IMAGES, value=1, step=1, label="Images", elem_id=f"{tab.name}-images", scale=3, min_width=150,
            buttons=[],
        )  # fmt: skip
        seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id=f"{tab.name}-seed", min_width=100, scale=2)
        tab.fields["seed"] = seed
        gr.Button("New seed", size="sm", min_width=70, scale=1).click(None, None, seed, js=_NEW)


def add_guidance(tab: Tab, studio: Studio, suits: str) -> None:
    """Add negative prompt, steps and guidance. suits: what the default of the scale suits."""
    shown = studio.offers
    tab.fields["negative_prompt"] = gr.Textbox(label="Negative prompt", max_lines=2, visible=shown("negative_prompt"))
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, value=30, step=1, label="Steps", elem_id=f"{tab.name}-steps")
        tab.fields["steps"] = steps
        for name, label, of in (("guidance_scale", "Guidance scale", suits), ("true_cfg_scale", TRUE_CFG, "base")):
            tab.fields[name] = optional_number(tab, label, f"auto: what suits the {of}", shown(name))


def optional_number(tab: Tab, label: str, placeholder: str, visible: bool = True) -> Any:
    """Return a field for a number or nothing: ``gr.Number`` has 0 for nothing as soon as it is shown."""
    name = f"{tab.name}-{label.lower().replace(' ', '-')}"
    return gr.Textbox(label=label, placeholder=placeholder, max_lines=1, visible=visible, elem_id=name)
