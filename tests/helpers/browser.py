"""The studio in a headless Chromium, as its users meet it: one server and one browser for a module of tests."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, expect, sync_playwright

from localctl.studio.config import StudioConfig
from localctl.studio.server import serve

DESKTOP = ViewportSize(width=1280, height=900)
PHONE = ViewportSize(width=390, height=844)
SECONDS = 20  # that a page may need for one answer, on a busy machine


def find_chromium() -> str | None:
    """Return the path of the system's Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(**settings: Any) -> Iterator[Any]:
    """Serve the studio in this process on a free port; ``.url`` is its address. Everything is put back afterwards."""
    before = dict(os.environ)
    port = free_port()
    blocks = serve(StudioConfig(port=port, **settings), block=False)
    blocks.url = f"http://127.0.0.1:{port}/"
    try:
        yield blocks
    finally:
        blocks.close()
        blocks.studio.close()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs of the studio, empty at first."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def studio(runs_folder: Path) -> Iterator[str]:
    """The address of a studio on the embedded base."""
    with running(runs=str(runs_folder)) as blocks:
        yield blocks.url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser, closed after the module: while it runs, no other event loop can run in this thread."""
    path = find_chromium()
    if path is None:
        pytest.skip("There is no Chromium on this machine; install it with: apt-get install -y chromium")
    expect.set_options(timeout=1000 * SECONDS)  # which those of a context do not cover
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser, studio: str) -> Iterator[Callable[..., Page]]:
    """Open the studio as a new visitor: ``visit(viewport=DESKTOP, **context_options)``.

    At the end of the test, no page may have raised an error, nor asked another host for anything.
    """
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def note_request(url: str) -> None:
        if not url.startswith((studio, "data:", "blob:", studio.replace("http", "ws", 1))):
            wrong.append(f"a request to {url}")

    def new(viewport: ViewportSize = DESKTOP, **options: Any) -> Page:
        context = chromium.new_context(viewport=viewport, accept_downloads=True, **options)
        context.set_default_timeout(1000 * SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: note_request(request.url))
        page.goto(studio)
        return page

    yield new
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(visit: Callable[..., Page]) -> Page:
    """The studio on a desktop, of a new visitor."""
    return visit()
