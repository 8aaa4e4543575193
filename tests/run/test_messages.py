from __future__ import annotations

import io

import pytest

from localctl.run.messages import fail, warn, warning


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
