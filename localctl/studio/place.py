"""The tab Place: regions on a canvas, a phrase for each, and the images that follow them."""

from __future__ import annotations

import gradio as gr

from localctl.studio.canvas import canvas
from localctl.studio.studio import Studio


def add(studio: Studio) -> None:
    """Add the tab to the page that is being built."""
    with gr.Row():
        with gr.Column(scale=6):
            gr.Textbox(label="Prompt", lines=2)
            canvas((128, 128), elem_id="place-canvas")
        with gr.Column(scale=5):
            gr.Button("Generate", variant="primary")
