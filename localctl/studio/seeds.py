"""How many images, and from which seed: the row that both tabs have."""

from __future__ import annotations

from typing import Any

import gradio as gr

from localctl.studio.limits import MAX_IMAGES

_NEW = "() => String(Math.floor(Math.random() * 2 ** 32))"


def add_seed_row(fields: dict[str, Any], tab: str) -> None:
    """Add the row to a tab, and its components to ``fields``; ``tab``: the beginning of their ids."""
    with gr.Row(elem_classes="studio-seeds"):
        fields["images"] = gr.Slider(
            1, MAX_IMAGES, value=1, step=1, label="Images", elem_id=f"{tab}-images", scale=3, min_width=150, buttons=[]
        )
        fields["seed"] = gr.Textbox("0", label="Seed", max_lines=1, elem_id=f"{tab}-seed", min_width=100, scale=2)
        new = gr.Button("New seed", size="sm", min_width=70, scale=1)
    new.click(None, None, fields["seed"], js=_NEW)
