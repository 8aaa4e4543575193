"""The tab Training: curves, sheets and checkpoints of runs."""

from __future__ import annotations

import gradio as gr

from localctl.studio.studio import Studio


def add(studio: Studio) -> None:
    """Add the tab to the page that is being built."""
    gr.Markdown("In preparation.")
