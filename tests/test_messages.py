from __future__ import annotations

import io
import sys
import warnings

import pytest

from localctl.cli.program import one_sentence
from localctl.messages import fail, loading, warn, warning


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_warning_is_yellow_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert warning("dim", io.StringIO()) == "warning: dim"
    assert warning("dim", Terminal()) == "\033[33mwarning:\033[0m dim"
    monkeypatch.setenv("NO_COLOR", "1")
    assert warning("dim", Terminal()) == "warning: dim"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert warning("dim", Terminal()) == "warning: dim"


def test_warnings_and_failures_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    warn("dim")
    fail("tool", ValueError("no such thing"))
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "warning: dim\ntool: no such thing\n")


def test_what_the_package_warns_of_in_a_program_reads_like_a_warning() -> None:
    shown = []

    @one_sentence("tool")
    def main() -> int:
        shown.extend(warnings.formatwarning("dim", kind, "here.py", 7) for kind in (UserWarning, FutureWarning))
        return 0

    before = warnings.formatwarning
    assert main() == 0 and warnings.formatwarning is before
    assert shown[0] == "warning: dim\n" and shown[1].startswith("here.py:7: FutureWarning: dim")


def test_a_terminal_shows_that_something_is_loading_and_then_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Terminal(), "loading ..."), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with loading():
            assert stream.getvalue() == shown
        assert stream.getvalue() == (shown and f"{shown}\r\033[K")
