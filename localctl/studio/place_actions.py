"""The handlers of the tab Place: each checks its fields (:mod:`localctl.studio.limits`) and returns what to show."""

from __future__ import annotations

import time
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
from localctl.studio.jobs_queue import Made, Stopped, Waiting, sentence
from localctl.studio.methods import METHODS, shown_presets
from localctl.studio.place_examples import example_scene, examples
from localctl.studio.place_form import read_form, read_sweep, settings_for, sweepable
from localctl.studio.place_jobs import Note, Shown, Step, run_job
from localctl.studio.scenes import highlighted, marks_of, prompt_of, scene_of
from localctl.studio.sessions import Session
from localctl.studio.studio import Studio
from localctl.studio.uploads import UNREADABLE, read_photo

MAX_JSON = 2_000_000  # bytes of a layout
_OF_METHOD = ("sweep_column", "sweep_row")


def generate(studio: Studio, names: Sequence[str], kind: str) -> Callable[..., Iterator[tuple[Any, Any]]]:
    """Return the handler of a job: ``images``, ``compare`` or ``sweep``. It yields (progress, gallery)."""

    def handler(request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any]]:
        session = studio.sessions.of(request)
        try:
            given = dict(zip(names, values, strict=True))
            form = read_form(given, studio.config)
            sweep = read_sweep(given, form) if kind == "sweep" else None
            heat = limits.flag("The heat maps", given.get("heat")) and kind != "sweep"
            folder = session.new_folder()
            settings = settings_for(form, folder, studio.config, compare=kind == "compare", sweep=sweep)
            yield from _run(
                studio, session, lambda report, check: run_job(studio, settings, folder, report, check, heat)
            )
        except Stopped as stop:
            yield progress.failed(str(stop)), gr.skip()
        except Exception as error:  # the next job works; a bug is in the log
            yield progress.failed(sentence(error)), gr.skip()

    return handler


def _run(studio: Studio, session: Session, work: Callable[..., None]) -> Iterator[tuple[Any, Any]]:
    """Run a job and yield (progress, gallery) as it goes on."""
    begun = time.monotonic()
    shown: list[Shown] = []
    notes: list[str] = []
    for event in studio.run(session, work):
        if isinstance(event, Waiting):
            yield progress.waiting(event.ahead), gr.skip()
            begun = time.monotonic()
            continue
        item = event.item if isinstance(event, Made) else None
        if isinstance(item, Note):
            notes.append(item.text)
            yield progress.starting(item.text), gr.skip()
        elif isinstance(item, Step):
            yield progress.stepping(item.text, item.share, item.previews), gr.skip()
        elif isinstance(item, Shown):
            session.keep(item.path, item)
            shown.append(item)
            yield gr.skip(), _gallery(shown)
    lines = [line for item in shown for line in item.lines]
    images = sum(item.kind == "image" for item in shown)
    kept = [note for note in notes if not note.startswith("Loading")]
    text = f"{images} image{'s'[: images - 1]} in {time.monotonic() - begun:.1f} s."
    yield progress.done(" ".join([text, *kept]), lines), _gallery(shown)


def _gallery(shown: Sequence[Shown]) -> list[tuple[str, str]]:
    """Return the gallery: images first, what they were made of below them."""
    order = {"image": 0, "sheet": 1, "heat": 2}
    return [(str(item.path), item.caption) for item in sorted(shown, key=lambda item: order[item.kind])]


def cancel(studio: Studio) -> Callable[..., None]:
    """Return the handler that stops the jobs of a tab."""

    def handler(request: gr.Request) -> None:
        studio.sessions.of(request).cancel()

    return handler


def look(studio: Studio) -> Callable[..., tuple[Any, Any]]:
    """Return the handler that finds the phrases: (prompt with its phrases marked, marks below the regions)."""

    def handler(prompt: Any, scene: Any) -> tuple[Any, Any]:
        try:
            text, read = limits.text("The prompt", prompt), limits.scene(scene)
        except ValueError as error:
            return progress.failed(str(error)), gr.skip()
        tokens, limit = studio.tokens(prompt_of(read, text))
        marks = marks_of(read, text, tokens)
        shown = {key: {"kind": mark.kind, "text": mark.text} for key, mark in marks.items()}
        return highlighted(read, text, marks, tokens, limit), gr.update(marks=shown)

    return handler


def method_outputs(names: Sequence[str]) -> list[str]:
    """Return the names of the fields that change with the method."""
    return [name for name in names if "." in name or name in _OF_METHOD]


def choose_method(base: str, names: Sequence[str], groups: Sequence[str]) -> Callable[[Any], list[Any]]:
    """Return the handler that shows the settings of a method, with its presets."""

    def handler(label: Any) -> list[Any]:
        try:
            method = METHODS[limits.choice("The method", label, METHODS)]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        usual, known = shown_presets(method, base), sweepable(method)
        sweeps = {
            "sweep_column": gr.update(choices=known, value=known[0] if known else None),
            "sweep_row": gr.update(choices=[*known, "none"], value=known[1] if len(known) > 1 else "none"),
        }
        fields = [
            sweeps.get(name) or (gr.update(value=usual[name]) if name in usual else gr.skip())
            for name in method_outputs(names)
        ]
        return [*fields, *(gr.update(visible=group in control_names(method)) for group in groups)]

    return handler


def behind(photo: Any) -> tuple[Any, Any]:
    """Show a photo behind the regions: (canvas, progress)."""
    try:
        return show_behind(read_photo("The photo", photo)), gr.skip()
    except ValueError as error:
        return show_behind(None), progress.failed(str(error))


def unreadable() -> tuple[str, None]:
    """Say that an upload is no image, and take it off the page: (progress, photo)."""
    return progress.failed(UNREADABLE), None


def last_behind(studio: Studio) -> Callable[..., Any]:
    """Return the handler that shows the last image of a tab behind its regions."""

    def handler(request: gr.Request) -> Any:
        from localctl.images import load_image

        session = studio.sessions.of(request)
        last = next((item for item in reversed(session.results.values()) if item.kind == "image"), None)
        if last is None:
            raise gr.Error("There is no image yet; generate one.", print_exception=False)
        return show_behind(load_image(last.path))

    return handler


def _loaded(studio: Studio, make: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., tuple[Any, ...]]:
    """Return a handler for (prompt, canvas, progress) from ``make``, which returns prompt and canvas; ``gr.skip()`` for
    a prompt that stays as it is, with what was typed meanwhile."""

    def handler(request: gr.Request, *values: Any) -> tuple[Any, ...]:
        try:
            prompt, value = make(studio.sessions.of(request), *values)
            limits.scene(value)
        except Exception as error:
            return gr.skip(), gr.skip(), progress.failed(sentence(error))
        return prompt, value, progress.IDLE

    return handler


def load_json(studio: Studio) -> Callable[..., tuple[Any, ...]]:
    """Return the handler that reads a layout from an uploaded JSON file."""

    def make(session: Session, content: Any, prompt: Any, scene: Any) -> tuple[str, dict[str, Any]]:
        path = session.new_folder() / "layout.json"
        path.write_bytes(limits.upload("The layout", content, MAX_JSON))
        return _shown_layout(load_layout(path), limits.scene(scene))

    return _loaded(studio, make)


def load_colors(studio: Studio) -> Callable[..., tuple[Any, ...]]:
    """Return the handler that makes a region of each colour of an uploaded image."""

    def make(session: Session, content: Any, prompt: Any, scene: Any) -> tuple[Any, dict[str, Any]]:
        size, regions = regions_by_color(limits.upload("The colour map", content, 10_000_000))
        return gr.skip(), canvas_value(size, regions)

    return _loaded(studio, make)


def predict(studio: Studio) -> Callable[..., tuple[Any, ...]]:
    """Return the handler that predicts a layout from the prompt; seed 0 is the most likely one."""

    def make(session: Session, prompt: Any, scene: Any, seed: Any) -> tuple[Any, dict[str, Any]]:
        from localctl.layout_predictor.model import load_predictor

        text = limits.text("The prompt", prompt).strip()
        if not text:
            raise ValueError("There is no prompt to predict a layout from; type one.")
        number = limits.seed(seed)
        predictor = load_predictor(studio.config.layout_predictor)
        return gr.skip(), _shown_layout(predictor.predict(text, number or None), limits.scene(scene))[1]

    return _loaded(studio, make)


def load_example(studio: Studio) -> Callable[..., tuple[Any, ...]]:
    """Return the handler that shows an example, at the size that the canvas has."""

    def make(session: Session, name: Any, prompt: Any, scene: Any) -> tuple[str, dict[str, Any]]:
        base, now = studio.config.base, limits.scene(scene)
        return example_scene(base, limits.choice("The example", name, examples(base)), (now.height, now.width))

    return _loaded(studio, make)


def clear(studio: Studio) -> Callable[..., tuple[Any, ...]]:
    """Return the handler that empties the prompt and the canvas, at the size it has."""

    def make(session: Session, prompt: Any, scene: Any) -> tuple[str, dict[str, Any]]:
        now = limits.scene(scene)
        return "", canvas_value((now.height, now.width))

    return _loaded(studio, make)


def _shown_layout(layout: Layout, scene: limits.Scene) -> tuple[str, dict[str, Any]]:
    return layout.prompt, scene_of(layout, (scene.height, scene.width))


def filled(studio: Studio, names: Sequence[str], groups: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    """Return the updates of ``PlaceTab.outputs`` that put ``values``, by the names of the fields, on the page.

    ValueError for a canvas or a method out of bounds.
    """
    updates = {name: gr.update(value=values[name]) if name in values else gr.skip() for name in names}
    shown: list[Any] = [gr.skip() for _ in groups]
    if "method" in values:
        method = METHODS[limits.choice("The method", values["method"], METHODS)]
        shown = [gr.update(visible=group in control_names(method)) for group in groups]
        known = sweepable(method)
        for name, choices in (("sweep_column", known), ("sweep_row", [*known, "none"])):
            value = values.get(name)
            updates[name] = gr.update(choices=choices, value=value if value in choices else next(iter(choices), None))
    if "scene" in values:
        limits.scene(values["scene"])
    limits.text("The prompt", values.get("prompt"))
    return [*updates.values(), *shown]


def restore(studio: Studio, names: Sequence[str], groups: Sequence[str]) -> Callable[[Any], list[Any]]:
    """Return the handler that puts back what the browser remembers of the tab; what does not fit is left as it is.

    Photos are not remembered: one that a page sends here would be a path, which Gradio would then serve.
    """
    kept = [name for name in names if name not in photos_of(names)]

    def handler(memory: Any) -> list[Any]:
        known = {name: memory[name] for name in kept if name in memory} if isinstance(memory, Mapping) else {}
        try:
            return filled(studio, names, groups, known)
        except ValueError as error:
            gr.Warning(f"What the browser remembers cannot be used: {error}")
            return filled(studio, names, groups, {})

    return handler
