"""Measure the studio on this machine: time from the command to the first image, memory, and what ten jobs leave.

  python -m research.benchmarks.studio
  python -m research.benchmarks.studio --jobs 20 --json outputs/studio.json

The server runs in a process of its own, on the embedded base, and is asked by HTTP as the page asks it: two regions, 30
steps, one image. Memory is the resident set of that process.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from research.flags import check_least

PROGRAM = "research.benchmarks.studio"
API = "/gradio_api"
SCENE = {
    "width": 128,
    "height": 128,
    "regions": [
        {"id": "r1", "color": 0, "phrase": "a red circle", "box": [0.05, 0.2, 0.45, 0.7]},
        {"id": "r2", "color": 1, "phrase": "a blue star", "box": [0.55, 0.3, 0.95, 0.8]},
    ],
}
PROMPT = "a red circle and a blue star on a gray background"
_MOST_SECONDS = 180.0


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line per figure."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--jobs", type=int, default=10, help="in a row, after the first two")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.read(argv)
    check_least(options, {"jobs": 1})
    figures = measure(options.jobs)
    for name, value in figures.items():
        print(f"{name:<44} {value:8.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(jobs: int) -> dict[str, float]:
    """Return the figures by name. ``jobs``: how many run in a row for the leak, after two that warm up."""
    begun = time.perf_counter()
    with _server() as (url, process):
        page = _Page(url)
        page.wait(begun)
        served, empty = time.perf_counter() - begun, _megabytes(process)
        page.generate(0)
        first, worked = time.perf_counter() - begun, sum(process.cpu_times()[:2])
        page.generate(1)
        idle, durations = _megabytes(process), []
        for seed in range(2, 2 + jobs):
            at = time.perf_counter()
            page.generate(seed)
            durations.append(time.perf_counter() - at)
        return {
            "from the command to the page, s": served,
            "from the command to the first image, s": first,
            "of these on the processor, s": worked,
            "a job of one image, s (median)": sorted(durations)[jobs // 2],
            "memory before the first job, MB": empty,
            "memory idle after two jobs, MB": idle,
            f"memory after {jobs} more jobs, MB": _megabytes(process),
            f"left by {jobs} jobs, MB": _megabytes(process) - idle,
        }


@contextmanager
def _server() -> Iterator[tuple[str, psutil.Process]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "localctl", "studio", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.terminate()


def _megabytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


class _Page:
    """The page without a browser: what its button Generate sends."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(timeout=_MOST_SECONDS)
        self.event: dict[str, Any] = {}
        self.values: dict[str, Any] = {}

    def wait(self, begun: float) -> None:
        """Wait until the page is served, and read what its button sends. OSError when it does not come."""
        while time.perf_counter() - begun < _MOST_SECONDS:
            try:
                config = self.http.get(f"{self.url}/config").json()
                break
            except httpx.TransportError:
                time.sleep(0.05)
        else:
            raise OSError(f"The studio did not answer within {_MOST_SECONDS:.0f} s.")
        parts = {part["id"]: part["props"] for part in config["components"]}
        button = next(key for key, props in parts.items() if props.get("elem_id") == "place-generate")
        self.event = next(item for item in config["dependencies"] if [button, "click"] in map(list, item["targets"]))
        self.values = {
            str(parts[item].get("elem_id") or item): parts[item].get("value") for item in self.event["inputs"]
        }

    def generate(self, seed: int) -> None:
        """Ask for one image and wait for it. OSError when there is none."""
        changed = {"place-prompt": PROMPT, "place-canvas": SCENE, "place-seed": seed}
        data = list({**self.values, **changed}.values())
        body = {"data": data, "fn_index": self.event["id"], "session_hash": "benchmark"}
        self.http.post(f"{self.url}{API}/queue/join", json=body).raise_for_status()
        address = f"{self.url}{API}/queue/data"
        told = ""
        with self.http.stream("GET", address, params={"session_hash": "benchmark"}) as stream:
            for line in stream.iter_lines():
                told = line
                if '"process_completed"' in line:
                    break
        if "1 image in" not in told:
            raise OSError(f"The studio generated no image: {told[:300]}")


if __name__ == "__main__":
    sys.exit(main())
