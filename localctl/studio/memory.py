"""What the browser remembers of a tab, and puts back when the page is loaded again.

Until it is back the page is not shown, and nothing is remembered: what a visitor did before, on a slow machine, would
be replaced, and what was remembered would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from localctl.studio.addon_fields import photos_of
from localctl.studio.latest import QUICK

_TABS = 2  # that are remembered
_KEEP = """(kept, ...values) => [document.body.classList.contains('studio-ready')
  ? Object.fromEntries(NAMES.map((name, index) => [name, values[index]])) : kept]"""
_BACK = f"""() => {{
  window.studioRestored = (window.studioRestored ?? 0) + 1;
  if (window.studioRestored === {_TABS}) document.body.classList.add('studio-ready');
}}"""


def remembered(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a tab that the browser remembers: all but photos.

    A photo that a page sends to be put back would be a path, which Gradio would then serve.
    """
    return {name: part for name, part in fields.items() if name not in photos_of(fields)}


def remember(
    blocks: Any, name: str, fields: Mapping[str, Any], restore: Callable[[Any], list[Any]], outputs: Sequence[Any]
) -> None:
    """Let the browser remember the ``fields`` of a tab.

    To be called outside the tabs: the memory of a tab that is not open would be empty.

    Args:
        blocks: the page.
        name: of the tab, one of two.
        fields: those of :func:`remembered`, by name.
        restore: from what is remembered, or None, to the updates of ``outputs``.
        outputs: the components that ``restore`` fills.
    """
    store = f"localctl-studio-{name}"
    memory = gr.BrowserState(None, storage_key=store, secret=store)
    changes = [part.change for part in fields.values()]
    gr.on(changes, None, [memory, *fields.values()], memory, js=_KEEP.replace("NAMES", json.dumps(list(fields))))
    back = blocks.load(restore, memory, outputs, **QUICK)
    for after in (back.success, back.failure):
        after(None, None, None, js=_BACK)
