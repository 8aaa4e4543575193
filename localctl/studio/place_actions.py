"""The handlers of the tab Place: each checks its fields (:mod:`localctl.studio.limits`) and returns what to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from localctl.control.presets import control_names
from localctl.layout import Layout
from localctl.layout_io import load_layout
from localctl.studio import limits, progress
from localctl.studio.addon_fields import photos_of
from localctl.studio.canvas import scene as canvas_value
from localctl.studio.canvas import show_behind
from localctl.studio.color_maps import regions_by_color
from localctl.studio.handlers import Asked, Handlers
from localctl.studio.jobs_queue import sentence
from localctl.studio.methods import METHODS, shown_presets
from localctl.studio.place_examples import example_scene, examples
from localctl.studio.place_form import read_form, read_sweep, settings_for, sweepable
from localctl.studio.place_jobs import Shown
from localctl.studio.scenes import highlighted, marks_of, prompt_of, scene_of
from localctl.studio.sessions import Session
from localctl.studio.studio import Studio
from localctl.studio.uploads import UNREADABLE, read_photo

MAX_JSON = 2_000_000  # bytes of a layout
_OF_METHOD = ("sweep_column", "sweep_row")


def _loading(make: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., tuple[Any, ...]]:
    """Make a handler for (prompt, canvas, progress) of ``make``, which returns prompt and canvas; ``gr.skip()`` for a
    prompt that stays as it is, with what was typed meanwhile."""

    def handler(self: PlaceHandlers, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        try:
            prompt, value = make(self, self.studio.sessions.of(request), *values)
            limits.scene(value)
        except Exception as error:
            return gr.skip(), gr.skip(), progress.failed(sentence(error))
        return prompt, value, progress.IDLE

    return handler


class PlaceHandlers(Handlers):
    """The handlers of the tab. groups: of the settings of its methods, which are shown or hidden, by control."""

    def __init__(self, studio: Studio, names: Sequence[str] = (), groups: Sequence[str] = ()) -> None:
        super().__init__(studio, names)
        self.groups = groups

    def generate(self, kind: str) -> Callable[..., Iterator[tuple[Any, Any]]]:
        """Return the handler of a job: ``images``, ``compare`` or ``sweep``. It yields (progress, gallery)."""

        def handler(request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any]]:
            def ask(session: Session) -> Asked:
                given, config = self.given(values), self.studio.config
                form = read_form(given, config)
                sweep = read_sweep(given, form) if kind == "sweep" else None
                heat = limits.flag("The heat maps", given.get("heat")) and kind != "sweep"
                folder = session.new_folder()
                settings = settings_for(form, folder, config, compare=kind == "compare", sweep=sweep)
                return settings, folder, heat, lambda item: item

            for told, shown in self.job(request, ask):
                yield told or gr.skip(), gr.skip() if shown is None else _gallery(shown)

        return handler

    def look(self, prompt: Any, scene: Any) -> tuple[Any, Any]:
        """Find the phrases: (prompt with its phrases marked, marks below the regions)."""
        try:
            text, read = limits.text("The prompt", prompt), limits.scene(scene)
        except ValueError as error:
            return progress.failed(str(error)), gr.skip()
        tokens, limit = self.studio.tokens(prompt_of(read, text))
        marks = marks_of(read, text, tokens)
        shown = {key: {"kind": mark.kind, "text": mark.text} for key, mark in marks.items()}
        return highlighted(read, text, marks, tokens, limit), gr.update(marks=shown)

    @property
    def of_method(self) -> list[str]:
        """The names of the fields that change with the method."""
        return [name for name in self.names if "." in name or name in _OF_METHOD]

    def choose_method(self, label: Any) -> list[Any]:
        """Show the settings of a method, with its presets: (``of_method``, groups)."""
        try:
            method = METHODS[limits.choice("The method", label, METHODS)]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        usual, known = shown_presets(method, self.studio.config.base), sweepable(method)
        sweeps = {
            "sweep_column": gr.update(choices=known, value=known[0] if known else None),
            "sweep_row": gr.update(choices=[*known, "none"], value=known[1] if len(known) > 1 else "none"),
        }
        fields = [
            sweeps.get(name) or (gr.update(value=usual[name]) if name in usual else gr.skip())
            for name in self.of_method
        ]
        return [*fields, *self._groups(method)]

    def _groups(self, method: str) -> list[Any]:
        return [gr.update(visible=group in control_names(method)) for group in self.groups]

    def last_behind(self, request: gr.Request) -> Any:
        """Show the last image of a browser's tab behind its regions."""
        from localctl.images import load_image

        last = self.studio.sessions.of(request).newest(lambda item: item.kind == "image")
        if last is None:
            raise gr.Error("There is no image yet; generate one.", print_exception=False)
        return show_behind(load_image(last.path))

    @_loading
    def load_json(self, session: Session, content: Any, prompt: Any, scene: Any) -> tuple[str, dict[str, Any]]:
        """Read a layout from an uploaded JSON file."""
        path = session.new_folder() / "layout.json"
        path.write_bytes(limits.upload("The layout", content, MAX_JSON))
        return _shown_layout(load_layout(path), limits.scene(scene))

    @_loading
    def load_colors(self, session: Session, content: Any, prompt: Any, scene: Any) -> tuple[Any, dict[str, Any]]:
        """Make a region of each colour of an uploaded image."""
        size, regions = regions_by_color(limits.upload("The colour map", content, 10_000_000))
        return gr.skip(), canvas_value(size, regions)

    @_loading
    def predict(self, session: Session, prompt: Any, scene: Any, seed: Any) -> tuple[Any, dict[str, Any]]:
        """Predict a layout from the prompt; seed 0 is the most likely one."""
        from localctl.layout_predictor.model import load_predictor

        text = limits.text("The prompt", prompt).strip()
        if not text:
            raise ValueError("There is no prompt to predict a layout from; type one.")
        number = limits.seed(seed)
        predictor = load_predictor(self.studio.config.layout_predictor)
        return gr.skip(), _shown_layout(predictor.predict(text, number or None), limits.scene(scene))[1]

    @_loading
    def load_example(self, session: Session, name: Any, prompt: Any, scene: Any) -> tuple[str, dict[str, Any]]:
        """Show an example, at the size that the canvas has."""
        base, now = self.studio.config.base, limits.scene(scene)
        return example_scene(base, limits.choice("The example", name, examples(base)), (now.height, now.width))

    @_loading
    def clear(self, session: Session, prompt: Any, scene: Any) -> tuple[str, dict[str, Any]]:
        """Empty the prompt and the canvas, at the size it has."""
        now = limits.scene(scene)
        return "", canvas_value((now.height, now.width))

    def filled(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the updates of ``PlaceTab.outputs`` that put ``values``, by the names of the fields, on the page.

        ValueError for a canvas or a method out of bounds.
        """
        updates = {name: gr.update(value=values[name]) if name in values else gr.skip() for name in self.names}
        shown: list[Any] = [gr.skip() for _ in self.groups]
        if "method" in values:
            method = METHODS[limits.choice("The method", values["method"], METHODS)]
            shown, known = self._groups(method), sweepable(method)
            for name, choices in (("sweep_column", known), ("sweep_row", [*known, "none"])):
                value = values.get(name)
                value = value if value in choices else next(iter(choices), None)
                updates[name] = gr.update(choices=choices, value=value)
        if "scene" in values:
            limits.scene(values["scene"])
        limits.text("The prompt", values.get("prompt"))
        return [*updates.values(), *shown]

    def restore(self, memory: Any) -> list[Any]:
        """Put back what the browser remembers of the tab; what does not fit is left as it is.

        Photos are not remembered: one that a page sends here would be a path, which Gradio would then serve.
        """
        kept = [name for name in self.names if name not in photos_of(self.names)]
        known = {name: memory[name] for name in kept if name in memory} if isinstance(memory, Mapping) else {}
        try:
            return self.filled(known)
        except ValueError as error:
            gr.Warning(f"What the browser remembers cannot be used: {error}")
            return self.filled({})


def _gallery(shown: Sequence[Shown]) -> list[tuple[str, str]]:
    """Return the gallery: images first, what they were made of below them."""
    order = {"image": 0, "sheet": 1, "heat": 2}
    return [(str(item.path), item.caption) for item in sorted(shown, key=lambda item: order[item.kind])]


def behind(photo: Any) -> tuple[Any, Any]:
    """Show a photo behind the regions: (canvas, progress)."""
    try:
        return show_behind(read_photo("The photo", photo)), gr.skip()
    except ValueError as error:
        return show_behind(None), progress.failed(str(error))


def unreadable() -> tuple[str, None]:
    """Say that an upload is no image, and take it off the page: (progress, photo)."""
    return progress.failed(UNREADABLE), None


def _shown_layout(layout: Layout, scene: limits.Scene) -> tuple[str, dict[str, Any]]:
    return layout.prompt, scene_of(layout, (scene.height, scene.width))
