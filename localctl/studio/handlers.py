"""What the handlers of both tabs share: their fields by name, the course of a job, and cancelling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from localctl.studio import progress
from localctl.studio.jobs_queue import Made, Waiting, sentence
from localctl.studio.place_jobs import Note, Shown, Step, run_job
from localctl.studio.sessions import Session
from localctl.studio.studio import Studio

# The settings of a run, its folder, whether heat maps are wanted, and what makes each image one of the gallery.
Asked = tuple[Mapping[str, Any], Path, bool, Callable[[Shown], Shown]]


class Handlers:
    """The handlers of a tab. names: of its fields, in the order of their components as inputs."""

    def __init__(self, studio: Studio, names: Sequence[str] = ()) -> None:
        self.studio, self.names = studio, names

    def given(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return what the page sends, by the names of the fields."""
        return dict(zip(self.names, values, strict=True))

    def cancel(self, request: gr.Request) -> None:
        """Stop the jobs of a browser's tab."""
        self.studio.sessions.of(request).cancel()

    def job(
        self, request: gr.Request, ask: Callable[[Session], Asked]
    ) -> Iterator[tuple[str | None, list[Shown] | None]]:
        """Run the job that ``ask`` makes of the page's fields; yield what is to be said of it, and all images so far.

        None: what is shown stays. The last pair has both, unless the job failed.
        """
        session = self.studio.sessions.of(request)
        shown: list[Shown] = []
        notes: list[str] = []
        try:
            settings, folder, heat, made = ask(session)
            begun = time.monotonic()
            for event in self.studio.run(
                session, lambda report, check: run_job(self.studio, settings, folder, report, check, heat)
            ):
                item = event.item if isinstance(event, Made) else event
                if isinstance(item, Waiting):
                    begun = time.monotonic()
                    yield progress.waiting(item.ahead), None
                elif isinstance(item, Note):
                    notes.append(item.text)
                    yield progress.starting(item.text), None
                elif isinstance(item, Step):
                    yield progress.stepping(item.text, item.share, item.previews), None
                elif isinstance(item, Shown):
                    shown.append(made(item))
                    session.keep(item.path, shown[-1])
                    yield None, shown
            lines = [line for item in shown for line in item.lines]
            images = sum(item.kind == "image" for item in shown)
            kept = [note for note in notes if not note.startswith("Loading")]
            text = f"{images} image{'s'[: images - 1]} in {time.monotonic() - begun:.1f} s."
            yield progress.done(" ".join([text, *kept]), lines), shown
        except Exception as error:  # the next job works; a bug is in the log
            yield progress.failed(sentence(error)), None


def chosen_name(event: gr.SelectData) -> str:
    """Return the name of the file that was chosen in a gallery; "" for anything else."""
    value = event.value if isinstance(event.value, Mapping) else {}
    return str((value.get("image") or {}).get("orig_name", ""))
