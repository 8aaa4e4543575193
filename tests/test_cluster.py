"""Connecting to Ray: quiet, on this machine or a cluster, and one sentence when that fails."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from localctl.cluster import available_cpus, connected, load_ray


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(load_ray(), "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = rf"no usable Ray cluster at RAY_ADDRESS={address} \(.*refused.*unset RAY_ADDRESS"
    with pytest.raises(ValueError, match=message), connected():
        pass


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ValueError, match=r'needs Ray, .* run `pip install "localctl\[scale\]"`\.'), connected():
        pass


def test_the_cpus_are_those_of_this_process() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
