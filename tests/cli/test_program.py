"""What goes wrong in a program is one sentence and an exit code."""

import os
import sys

import pytest

from localctl.cli.program import one_sentence


@one_sentence("tool")
def main(error: Exception | None = None) -> int:
    """Docs."""
    if error is not None:
        raise error
    return 5


@pytest.mark.parametrize(("error", "code"), [(ValueError("No such base."), 2), (OSError("disk full"), 1)])
def test_errors_become_a_sentence_and_a_code(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(error) == code
    assert capsys.readouterr().err == f"tool: {error}\n"


def test_all_else_goes_its_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 5 and main.__doc__ == "Docs."
    for error in (KeyError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            main(error)
    assert capsys.readouterr().err == ""


def test_who_reads_only_the_first_lines_is_told_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @one_sentence("tool")
    def chatty(lines: int) -> int:
        print("help\n" * lines, end="")
        return 0

    for lines in (1, 10_000):  # found out when the text is flushed, or in the midst of it
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as gone:
            monkeypatch.setattr(sys, "stdout", gone)
            assert chatty(lines) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
    assert main(BrokenPipeError("the worker is gone")) == 1  # another pipe than stdout is said
    assert capsys.readouterr().err == "tool: the worker is gone\n"
