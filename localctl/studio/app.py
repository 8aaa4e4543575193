"""The page of the studio: its tabs, and what they share."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from localctl import __version__
from localctl.studio import leaving_bar, local_control, place, training_tab
from localctl.studio.config import StudioConfig, short_name
from localctl.studio.jobs_queue import JobQueue
from localctl.studio.local_control_actions import FollowHandlers
from localctl.studio.memory import remember, remembered
from localctl.studio.studio import Studio

CACHE_SECONDS = (600, 3600)  # uploads are looked through this often, and deleted after that long
QUEUE_SIZE = 32
_TOGGLE = (
    "document.body.classList.toggle('dark');"
    "try{localStorage.setItem('studio-dark',document.body.classList.contains('dark'))}catch(e){}"
)


def build(config: StudioConfig | None = None) -> Any:
    """Return the page as ``gr.Blocks``, not yet served; ``blocks.studio`` is what its tabs share.

    No model is loaded before the first job.
    """
    config = config or StudioConfig()
    studio = Studio(config, JobQueue(config.time_limit))
    with gr.Blocks(
        title="localctl studio", analytics_enabled=False, delete_cache=CACHE_SECONDS, fill_width=True
    ) as blocks:
        gr.HTML(_header(config), elem_id="studio-header")
        with gr.Tabs(elem_id="studio-tabs") as tabs:
            with gr.Tab("Place", id="place"):
                tab = place.add(studio)
            with gr.Tab("Local control", id="local_control"):
                follow = local_control.add(studio)
            with gr.Tab("Training", id="training"):
                training_tab.add(studio, blocks, follow.adapters, tabs)

        leaving_bar.add(studio, tab, follow, tabs)

        def end(request: gr.Request) -> None:
            studio.sessions.end(request)

        blocks.unload(end)
        remember(blocks, "place", remembered(tab.fields), tab.handlers.restore, tab.outputs)
        kept = remembered(follow.fields)
        restore = FollowHandlers(studio, list(kept)).restore
        remember(blocks, "follow", kept, restore, [*kept.values(), *follow.rows])
    blocks.studio = studio
    blocks.queue(max_size=QUEUE_SIZE, default_concurrency_limit=QUEUE_SIZE, api_open=False)
    return blocks


def _header(config: StudioConfig) -> str:
    parts = [f"base {short_name(config.base)}"]
    for kind, places in (
        ("adapter", config.adapter),
        ("ControlNet", config.controlnet),
        ("IP-Adapter", config.ip_adapter),
        ("LoRA", config.lora),
        ("word", config.textual_inversion),
    ):
        parts += [f"{kind} {short_name(place)}" for place in places]
    parts += [f"{config.device}"] if config.device != "auto" else []
    chips = "".join(f'<span class="studio-chip">{escape(part)}</span>' for part in parts)
    return (
        '<div class="studio-header"><span class="studio-name">localctl <b>studio</b></span>'
        f'<span class="studio-chips">{chips}</span>'
        '<button type="button" class="studio-dark" title="Light or dark" aria-label="Light or dark" '
        f'onclick="{_TOGGLE}">&#9680;</button>'
        f'<span class="studio-version">{escape(__version__)}</span></div>'
    )
