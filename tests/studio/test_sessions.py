"""A browser tab has a folder and results of its own; other tabs cannot name them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from localctl.studio.sessions import MOST_SESSIONS, Sessions


def request(name: str | None) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    every = Sessions()
    yield every
    every.close()


def test_a_tab_has_its_own_folder(sessions: Sessions) -> None:
    one, other = sessions.of(request("a")), sessions.of(request("b"))
    assert one.folder != other.folder and one.folder.is_dir()
    assert sessions.of(request("a")) is one


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b", "..", None, "\ud800", "x" * 5000])
def test_the_name_that_a_page_gives_its_session_is_never_a_path(sessions: Sessions, name: str | None) -> None:
    folder = sessions.of(request(name)).folder
    assert len(folder.name) == 32 and folder.name.isalnum()


def test_a_closed_tab_leaves_nothing_and_its_jobs_are_cancelled(sessions: Sessions) -> None:
    session, job = sessions.of(request("a")), threading.Event()
    (session.new_folder() / "0.png").touch()
    session.running.add(job)
    sessions.end(request("a"))
    assert job.is_set() and not session.folder.exists() and len(sessions) == 0


def test_jobs_that_begin_at_once_have_folders_of_their_own(sessions: Sessions) -> None:
    session = sessions.of(request("a"))
    (session.folder / "job_00001").mkdir()  # of another job that counted at the same time
    assert session.new_folder().name == "job_00002"


def test_the_oldest_idle_tab_is_forgotten_first(sessions: Sessions) -> None:
    busy, idle = sessions.of(request("busy")), sessions.of(request("idle"))
    busy.running.add(threading.Event())
    for index in range(MOST_SESSIONS - 1):
        sessions.of(request(f"tab {index}"))
    assert len(sessions) == MOST_SESSIONS
    assert busy.folder.exists() and not idle.folder.exists()


def test_old_results_are_deleted(sessions: Sessions) -> None:
    session = sessions.of(request("a"))
    folder = session.new_folder()
    paths = [folder / f"{index}.png" for index in range(70)]
    for path in paths:
        path.touch()
        path.with_suffix("").mkdir()  # what leaves with it
        session.keep(path, path.name)
    assert len(session.results) == 64
    assert [path.with_suffix("").exists() for path in (paths[5], paths[6])] == [False, True]
    assert [path.exists() for path in (paths[5], paths[6], paths[69])] == [False, True, True]


def test_all_folders_are_gone_with_the_server() -> None:
    sessions = Sessions()
    folder = sessions.of(request("a")).folder
    sessions.close()
    assert not folder.exists() and not folder.parent.exists()
