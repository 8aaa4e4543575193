from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest

from localctl.cli.program import one_sentence
from localctl.messages import fail, loading, log_to_screen, warn, warning


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


def test_messages_are_printed_bare_while_a_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of localctl alone, each once, whatever the root logger has for handlers."""
    logger, root = logging.getLogger("localctl.anything"), logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(root)
    try:
        with log_to_screen():
            logger.info("100% done")
            with log_to_screen(lambda text: print(f"tool: {text}")):
                logger.warning("dim")
            logger.debug("not shown")
            logging.getLogger("library").info("not shown")
        logger.info("not shown")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().out == "100% done\ntool: warning: dim\n"


def test_a_full_terminal_stops_no_training_and_other_processes_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("localctl.training")

    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    with log_to_screen(full, tolerant=True):
        logger.info("lost")
    with log_to_screen(full), pytest.raises(OSError, match="No space left"):
        logger.info("lost")
    monkeypatch.setenv("RANK", "1")
    with log_to_screen(first_process_only=True):
        logger.info("of the second process")
    assert capsys.readouterr().out == ""
