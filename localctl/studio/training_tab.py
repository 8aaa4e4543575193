"""The tab Training: curves, sheets and adapters of the runs in the server's runs folder; a quick run of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from localctl.images import load_image
from localctl.studio import progress
from localctl.studio.jobs_queue import sentence
from localctl.studio.latest import PRIVATE
from localctl.studio.local_control_job import adapter_places
from localctl.studio.studio import Studio
from localctl.studio.training_runs import (
    Progress,
    Trainer,
    adapter_label,
    curve_points,
    find_run,
    list_runs,
    run_adapters,
    sheet_files,
)

MOST_RUNS = 6  # in one plot
_PLOTS = ("denoising loss", "local loss", "validation F1", "learning rate")
_POLL = 1.5  # seconds between two looks at a running training
_RUNS = "The curves of all of them; sheets and adapters of the first one."
_NO_RUNS = "There are no runs in the folder of --runs yet; train a quick adapter."
_NOTE = (
    "A quick run trains 100 steps on the embedded scenes (minutes on a CPU): a look at the whole way from data to "
    "adapter, too short for a good one. It belongs to this server: everybody who opens this page sees it, and it goes "
    "on when the page is closed."
)


@dataclass(frozen=True)
class _View:
    """The parts of the tab that show a choice of runs."""

    runs: Any
    plots: list[Any]
    step: Any
    sheet: Any
    adapter: Any

    @property
    def parts(self) -> list[Any]:
        """All of them, in the order of :func:`_shown`."""
        return [self.runs, *self.plots, self.step, self.sheet, self.adapter]


def add(studio: Studio, blocks: Any, used_by: Sequence[Any] = (), tabs: Any = None) -> None:
    """Add the tab to the page that is being built.

    used_by: dropdowns of adapters in other tabs; the first one takes an adapter that is chosen here. tabs: to switch to
    their tab.
    """
    root = Path(studio.config.runs).expanduser()
    trainer = Trainer(root)
    studio.closing.append(trainer.close)
    with gr.Row(elem_classes="studio-bar"):
        runs = gr.Dropdown(
            [], multiselect=True, max_choices=MOST_RUNS, label="Runs", scale=5, elem_id="training-runs",
            info=_RUNS,
        )  # fmt: skip
        refresh = gr.Button("Look again", size="md", scale=0, min_width=120)
    with gr.Row():
        with gr.Column(scale=3, min_width=360):
            plots = _add_plots()
            step = gr.Dropdown([], label="Validation sheet of step", elem_id="training-step")
            sheet = gr.Image(
                label="Validation sheet",
                show_label=False,  # it would cover the first words; the choice above says what it is
                interactive=False,
                format="png",
                buttons=["fullscreen"],
                elem_id="training-sheet",
            )
        with gr.Column(scale=2, min_width=300):
            with gr.Group():
                adapter = gr.Dropdown([], label="Adapter", elem_id="training-adapter")
                use = gr.Button("Use it in Local control", size="md", elem_id="training-use")
            gr.HTML(f'<p class="studio-note">{escape(_NOTE)}</p>')
            with gr.Row():
                start = gr.Button("Train a quick adapter", size="md", variant="primary", elem_id="training-start")
                stop = gr.Button("Stop", size="md", variant="stop", interactive=False, elem_id="training-stop")
            bar = gr.HTML(_bar(None), elem_id="training-progress")
    view = _View(runs, plots, step, sheet, adapter)
    timer = gr.Timer(_POLL, active=False)
    _wire_view(view, root, blocks, refresh)
    _wire_training(view, root, trainer, (start, stop, bar, timer), blocks)
    if used_by:
        _wire_use(view, studio, use, used_by, tabs)


def _add_plots() -> list[Any]:
    plots: list[Any] = []
    for pair in (_PLOTS[:2], _PLOTS[2:]):
        with gr.Row():
            for name in pair:
                plots.append(
                    gr.LinePlot(
                        x="step", y="value", color="run", title=name, x_title="step", y_title=" ", height=210,
                        min_width=240, tooltip="all", buttons=[], elem_classes="studio-plot",
                    )
                )  # fmt: skip
    return plots


def _wire_view(view: _View, root: Path, blocks: Any, refresh: Any) -> None:
    """Show the newest run when the page opens, what is chosen when that changes, and other sheets."""
    shown = view.parts

    @_or_nothing(len(shown))
    def look(chosen: list[str] | None) -> list[Any]:
        return _shown(root, chosen or None)  # the newest run, where none is chosen

    @_or_nothing(len(shown) - 1)
    def show(chosen: list[str] | None) -> list[Any]:
        return _shown(root, chosen or [])[1:]

    @_or_nothing(1)
    def show_sheet(chosen: list[str] | None, step: int | None) -> Any:
        return _sheet(root, chosen, step)

    blocks.load(lambda: look(None), None, shown, **PRIVATE)
    refresh.click(look, view.runs, shown, **PRIVATE)
    view.runs.input(show, view.runs, shown[1:], **PRIVATE)
    view.step.input(show_sheet, [view.runs, view.step], view.sheet, **PRIVATE)


def _or_nothing(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a handler say in one sentence what cannot be read, such as a run that was deleted meanwhile, and leave its
    ``count`` outputs as they are."""

    def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def told(*values: Any) -> Any:
            try:
                return handler(*values)
            except (ValueError, OSError) as error:
                gr.Warning(sentence(error))
                return [gr.skip()] * count if count > 1 else gr.skip()

        return told

    return wrap


def _shown(root: Path, chosen: list[str] | None) -> list[Any]:
    """Return updates of all parts of a :class:`_View`, for these runs; None chooses the newest."""
    known = list_runs(root)
    names = [name for name in chosen or () if name in known][:MOST_RUNS]
    if chosen is None or (chosen and not names):
        names = list(known)[:1]
    points = {name: curve_points(known[name]) for name in names}
    frames = [_frame({name: points[name].get(plot, []) for name in names}) for plot in _PLOTS]
    first = known[names[0]] if names else None
    steps = list(sheet_files(first)) if first else []
    adapters = list(run_adapters(first)) if first else []
    newest = steps[-1] if steps else None
    return [
        gr.update(choices=list(known), value=names, info=_RUNS if known else _NO_RUNS),
        *(gr.update(value=frame, visible=not frame.empty) for frame in frames),
        gr.update(choices=steps, value=newest, visible=bool(steps)),
        gr.update(value=_sheet(root, names, newest), visible=bool(steps)),
        gr.update(choices=adapters, value=adapters[0] if adapters else None),
    ]


def _frame(points: dict[str, list[tuple[int, float]]]) -> pd.DataFrame:
    rows = [(step, value, name) for name, values in points.items() for step, value in values]
    return pd.DataFrame(rows, columns=["step", "value", "run"])


def _sheet(root: Path, chosen: list[str] | None, step: int | None) -> Any:
    """Return the validation sheet of the first run; None where there is none, or none that can be read.

    ValueError for a run that was deleted meanwhile.
    """
    if not chosen or step is None:
        return None
    path = sheet_files(find_run(root, chosen[0])).get(int(step))
    try:
        return None if path is None else load_image(path)
    except (ValueError, OSError):
        gr.Warning(f"The sheet of step {step} cannot be read; if it is being written now, look again.")
        return None


def _wire_training(view: _View, root: Path, trainer: Trainer, parts: tuple[Any, ...], blocks: Any) -> None:
    """Start and stop the training, and follow it while it runs."""
    start, stop, bar, timer = parts
    controls = [start, stop, bar, timer]
    shown = view.parts

    def state() -> list[Any]:
        training = trainer.progress()
        running = training is not None and training.running
        return [
            gr.update(interactive=not running),
            gr.update(interactive=running),
            _bar(training),
            gr.update(active=running),
        ]

    def begin() -> list[Any]:
        try:
            trainer.start()
        except (ValueError, OSError) as error:
            gr.Warning(str(error))
        return state()

    def end() -> list[Any]:
        try:
            trainer.stop()
        except ValueError as error:
            gr.Warning(str(error))
        return state()

    @_or_nothing(len(controls) + len(shown))
    def follow(chosen: list[str] | None) -> list[Any]:
        training = trainer.progress()
        if training is None or training.run not in list_runs(root):
            return [*state(), *[gr.skip()] * len(shown)]
        rest = [name for name in chosen or () if name != training.run]
        updates = _shown(root, [training.run, *rest])
        if (chosen or [])[:1] == [training.run]:
            updates[0] = gr.skip()  # what is chosen meanwhile stays
        return [*state(), *updates]

    start.click(begin, None, controls, **PRIVATE)
    stop.click(end, None, controls, **PRIVATE)
    timer.tick(follow, view.runs, [*controls, *shown], **PRIVATE)
    blocks.load(state, None, controls, **PRIVATE)


def _wire_use(view: _View, studio: Studio, use: Any, used_by: Sequence[Any], tabs: Any) -> None:
    """Let other tabs take the adapter that is chosen here."""
    root = Path(studio.config.runs).expanduser()

    @_or_nothing(1 + len(used_by))
    def take(chosen: list[str] | None, adapter: str | None) -> list[Any]:
        if not chosen or adapter not in run_adapters(find_run(root, chosen[0])):
            gr.Warning("This run has no adapter yet; choose another run, or wait for its first checkpoint.")
            return [gr.skip()] * (1 + len(used_by))
        chosen_label, labels = adapter_label(chosen[0], adapter), list(adapter_places(studio.config))
        updates = [gr.update(choices=labels) for _ in used_by]
        updates[0] = gr.update(choices=labels, value=chosen_label)
        return [gr.update(selected="local_control"), *updates]

    use.click(take, [view.runs, view.adapter], [tabs, *used_by], **PRIVATE)


def _bar(training: Progress | None) -> str:
    """Return the progress of a training as HTML."""
    if training is None:
        return ""
    share = training.step / training.of if training.of else 0.0
    count = f" {training.step} of {training.of} steps" if training.of else ""
    return progress.stepping(f"{training.run}: {training.doing}{count}", share)
