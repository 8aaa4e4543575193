"""Jobs run one at a time in the order they were asked for; each can be cancelled; an error leaves the queue usable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from localctl.files import not_written
from localctl.jobs.files import save
from localctl.studio.config import StudioConfig
from localctl.studio.jobs_queue import JobQueue, Made, Stopped, Waiting, sentence
from localctl.studio.sessions import Session
from localctl.studio.studio import Studio


def reporting(*items: Any) -> Callable[..., None]:
    def work(report: Callable[[Any], None], check: Callable[[], None]) -> None:
        for item in items:
            check()
            report(item)

    return work


def items_of(queue: JobQueue, work: Callable[..., None], cancelled: threading.Event | None = None) -> list[Any]:
    return [event.item for event in queue.run(work, cancelled or threading.Event()) if isinstance(event, Made)]


def test_what_a_job_reports_arrives_in_order() -> None:
    assert items_of(JobQueue(), reporting(1, 2, 3)) == [1, 2, 3]


def test_an_error_of_a_job_is_raised_where_it_was_asked_for_and_the_next_works() -> None:
    queue = JobQueue()

    def fail(report: Any, check: Any) -> None:
        raise ValueError("The prompt is too long.")

    with pytest.raises(ValueError, match="too long"):
        items_of(queue, fail)
    assert items_of(queue, reporting("next")) == ["next"] and queue.length == 0


def test_a_cancelled_job_stops_at_its_next_check() -> None:
    queue, cancelled = JobQueue(), threading.Event()

    def work(report: Any, check: Any) -> None:
        while True:
            check()
            report("step")

    with pytest.raises(Stopped, match="Cancelled"):
        for event in queue.run(work, cancelled):
            assert isinstance(event, Made)
            cancelled.set()
    assert queue.length == 0


def test_a_job_is_cancelled_when_nobody_listens_any_more() -> None:
    queue, ended = JobQueue(), threading.Event()

    def work(report: Any, check: Any) -> None:
        try:
            while True:
                check()
                report("step")
        finally:
            ended.set()

    events = queue.run(work, threading.Event())
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert ended.is_set() and queue.length == 0


def test_a_job_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(Stopped, match="the limit of a job"):
        items_of(JobQueue(time_limit=-1.0), reporting(1))


def test_the_second_job_waits_and_says_behind_how_many() -> None:
    queue, go, running = JobQueue(), threading.Event(), threading.Event()
    order: list[str] = []

    def slow(report: Any, check: Any) -> None:
        running.set()
        assert go.wait(20)
        order.append("first")

    first = threading.Thread(target=items_of, args=(queue, slow))
    first.start()
    assert running.wait(20)
    seen = []
    for event in queue.run(lambda report, check: order.append("second"), threading.Event()):
        seen.append(event)
        go.set()
    first.join()
    assert seen == [Waiting(1)] and order == ["first", "second"]


def test_a_waiting_job_can_be_cancelled_and_a_full_queue_refuses() -> None:
    queue, go, running = JobQueue(most_waiting=1), threading.Event(), threading.Event()

    def slow(report: Any, check: Any) -> None:
        running.set()
        assert go.wait(20)

    first = threading.Thread(target=items_of, args=(queue, slow))
    first.start()
    assert running.wait(20)
    cancelled = threading.Event()
    waiting = queue.run(reporting(1), cancelled)
    assert next(waiting) == Waiting(1)
    with pytest.raises(ValueError, match="1 jobs are waiting already; try again in a minute"):
        next(queue.run(reporting(2), threading.Event()))
    cancelled.set()
    with pytest.raises(Stopped, match="while it was waiting"):
        next(waiting)
    go.set()
    first.join()
    assert queue.length == 0


def test_after_a_lack_of_memory_the_models_are_freed_and_the_next_job_works(tmp_path: Any) -> None:
    studio, session = Studio(StudioConfig()), Session(tmp_path)
    studio.models = object()

    def starve(report: Any, check: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(torch.OutOfMemoryError) as error:
        list(studio.run(session, starve))
    assert "not enough memory" in sentence(error.value) and "CUDA" not in sentence(error.value)
    assert studio.models is None and session.running == set()
    assert [event.item for event in studio.run(session, reporting(1)) if isinstance(event, Made)] == [1]
    studio.close()


def test_a_bug_is_logged_and_its_text_is_not_shown(caplog: Any) -> None:
    told = sentence(KeyError("/home/me/secret"))
    assert "KeyError" in told and "secret" not in told
    assert "a job of the studio failed" in caplog.text
    full = OSError(28, "No space left on device")
    for error in (full, not_written(Path("/home/me/secret"), full)):
        assert sentence(error) == "A file could not be read or written (No space left on device)."
    with pytest.raises(OSError, match="/home/me/gone/a.png could not be written") as unwritable:
        save(Image.new("L", (1, 1)), Path("/home/me/gone/a.png"))
    assert sentence(unwritable.value) == "A file could not be read or written (No such file or directory)."
