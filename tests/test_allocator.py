"""Freed memory is kept where the C library can, and the user's own choice stays."""

import ctypes
import sys

import pytest

from localctl.allocator import keep_freed_memory


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_choice_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", None)  # not even looked for
    assert not keep_freed_memory({name: "1"})


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory({})


def test_both_thresholds_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            chosen[option] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert keep_freed_memory({}) and set(chosen) == {-1, -3} and min(chosen.values()) > 2**25


def test_an_older_glibc_gets_the_largest_threshold_that_it_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            if option == -3 and value > 2**25:
                return 0
            chosen[option] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert keep_freed_memory({}) and chosen == {-3: 2**25, -1: 2**30}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_glibc_knows_the_function() -> None:
    assert callable(ctypes.CDLL(None).mallopt)
