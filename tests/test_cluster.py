"""Connecting to Ray: quiet, on this machine or a cluster, and one sentence when that fails."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

import localctl
from localctl.cluster import available_cpus, connected, load_ray


def test_workers_run_one_thread_and_import_this_package(capfd: pytest.CaptureFixture[str], ray_here: None) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with connected() as ray:

        def found(batch: dict[str, list[int]]) -> dict[str, list[object]]:
            import localctl as package

            return {"file": [package.__file__], "threads": [os.environ["OMP_NUM_THREADS"]]}

        rows = ray.data.range(2).map_batches(found, batch_size=1).take_all()
    assert {(row["file"], row["threads"]) for row in rows} == {(str(Path(localctl.__file__)), "1")}
    assert ray.is_initialized()  # it was there before
    assert signal.getsignal(signal.SIGTERM) is handler
    shown = capfd.readouterr()
    assert not shown.out and not shown.err


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{}".format(free.getsockname()[1])
    monkeypatch.setattr(load_ray(), "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=rf"no usable Ray cluster at RAY_ADDRESS={address} \(.*refused.*unset RAY_ADD"):
        with connected():
            pass


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ValueError, match=r'needs Ray, .* run `pip install "localctl\[scale\]"`\.'), connected():
        pass


def test_the_cpus_are_those_of_this_process() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
