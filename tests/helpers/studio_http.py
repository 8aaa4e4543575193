"""The studio in this process, on a free port, spoken to by HTTP as its page does."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from localctl.studio.config import StudioConfig
from localctl.studio.server import serve

API = "/gradio_api"


@dataclass
class Visitor:
    """A browser tab without a browser. session: the name that it gives itself."""

    url: str
    session: str = "tab"
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def config(self) -> dict[str, Any]:
        return self.get("/config").json()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(self.url + path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.http.post(self.url + path, **options)

    def upload(self, name: str, content: bytes) -> httpx.Response:
        return self.post(f"{API}/upload", files={"files": (name, content)})

    def event(self, elem_id: str, event: str = "click") -> dict[str, Any]:
        """Return the event that a component with this id triggers, as the page's configuration has it."""
        config = self.config()
        found = [part["id"] for part in config["components"] if part["props"].get("elem_id") == elem_id]
        return next(item for item in config["dependencies"] if [found[0], event] in [list(t) for t in item["targets"]])

    def values(self, event: dict[str, Any], **changes: Any) -> list[Any]:
        """Return the inputs of an event as the page has them at the start; ``changes`` by elem_id, - as _."""
        parts = {part["id"]: part["props"] for part in self.config()["components"]}
        own = [parts[item] for item in event["inputs"]]
        names = [str(props.get("elem_id") or "").removeprefix("place-").replace("-", "_") for props in own]
        return [changes.get(name, props.get("value")) for name, props in zip(names, own, strict=True)]

    def run(self, event: dict[str, Any], data: Any) -> list[dict[str, Any]]:
        """Run an event through the queue; return all messages about it."""
        body = {"data": data, "fn_index": event["id"], "session_hash": self.session, "event_data": None}
        joined = self.post(f"{API}/queue/join", json=body)
        if joined.status_code != 200:
            return [{"msg": "refused", "status": joined.status_code, "success": False}]
        messages = []
        with self.http.stream("GET", f"{self.url}{API}/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
                    if messages[-1]["msg"] in ("process_completed", "close_stream"):
                        break
        return messages

    def direct(self, event: dict[str, Any], data: Any) -> httpx.Response:
        """Run an event that does not wait in the queue."""
        body = {"data": data, "fn_index": event["id"], "session_hash": self.session}
        return self.post(f"{API}/run/predict", json=body)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """The studio on the embedded base; ``served.url`` is its address."""
    before = dict(os.environ)
    os.environ.update(GRADIO_SHARE="True", GRADIO_ALLOWED_PATHS="/etc", GRADIO_MCP_SERVER="True")
    port = free_port()
    blocks = serve(StudioConfig(port=port), block=False)
    blocks.url = f"http://127.0.0.1:{port}"
    yield blocks
    blocks.close()
    blocks.studio.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def visitor(served: Any) -> Iterator[Visitor]:
    tab = Visitor(served.url)
    yield tab
    tab.http.close()
