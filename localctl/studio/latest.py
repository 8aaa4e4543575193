"""Quick answers of the page, of which an older one never replaces a newer one.

Handlers that look at what is typed or painted may answer out of order: several write to the same components, and a slow
one may end after a quick one that was asked later. So the page numbers what it asks, the answer carries the number, and
the page drops each part of an answer for which it has a newer one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = PRIVATE | {"queue": False}
# Of what is chosen or loaded: one at a time, in order. "always_last" would send the first choice again, not the last.
CHOSEN: dict[str, Any] = PRIVATE | {"concurrency_limit": 1, "concurrency_id": "chosen", "trigger_mode": "multiple"}
_ASK = """(...values) => {
  const asked = (window.studioAsked = (window.studioAsked ?? 0) + 1);
  for (const id of IDS) (window.studioShown ??= {})[`${id}.value`] = asked;
  return [...values.slice(0, -1), asked];
}"""
_SHOW = """(answer) => {
  const shown = (window.studioShown ??= {});
  const newer = (update, owner) => Object.fromEntries(Object.entries(update).flatMap(([name, value]) => {
    const key = `${owner}.${name}`;
    if (name === 'props') return [[name, newer(value, key)]];
    if (name === '__type__' || answer.asked <= (shown[key] ?? 0)) return [];
    shown[key] = answer.asked;
    return [[name, value]];
  }));
  return IDS.map((id, index) => ({ ...newer(answer?.parts[index] ?? {}, id), __type__: 'update' }));
}"""


def on_latest(
    events: Sequence[Any],
    handler: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    chosen: Sequence[Any] = (),
) -> Any:
    """Connect ``events`` to a handler whose answers are shown in the order they were asked for; return the event.

    Args:
        events: of the components.
        handler: takes the inputs alone, and returns, for each output, an update or a text as the page has it: Gradio
            writes no file for it, and does not learn of other choices.
        inputs: of the handler.
        outputs: of the handler.
        chosen: the components in which the visitor has just chosen a value, which no older answer replaces.
    """
    asked, answer = gr.Number(0, visible=False), gr.JSON(visible=False)

    def numbered(*values: Any) -> dict[str, Any]:
        parts = handler(*values[:-1])
        parts = [parts] if len(outputs) == 1 else parts
        return {"asked": values[-1], "parts": [_update(*pair) for pair in zip(parts, outputs, strict=True)]}

    ask, show = _about(_ASK, chosen), _about(_SHOW, outputs)
    event = gr.on(events, numbered, [*inputs, asked], answer, js=ask, trigger_mode="always_last", **QUICK)
    event.success(None, answer, outputs, js=show, **QUICK)
    return event


def _about(script: str, parts: Sequence[Any]) -> str:
    return script.replace("IDS", json.dumps([part._id for part in parts]))


def _update(part: Any, output: Any) -> dict[str, Any]:
    """Return what a handler gives for an output as the page has it: properties of our own stand apart."""
    if not isinstance(part, dict) or part.get("__type__") != "update":
        return {"value": part}
    own = getattr(output, "props", None) or {}
    props = {name: value for name, value in part.items() if name in own}
    return {name: value for name, value in part.items() if name not in own} | ({"props": props} if props else {})
