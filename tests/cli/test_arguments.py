"""Flags of the programs that have a few: every spelling, and mistakes in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from localctl.cli.arguments import Arguments
from localctl.messages import nearest


def parser() -> Arguments:
    made = Arguments("tool", "What it is for.")
    made.add_argument("sets", nargs="*", metavar="NAME=FOLDER")
    made.add_argument("--output_dir", default="out", help="where to")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the noise")
    made.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings")
    made.add_argument("--prompt", help="a text")
    made.add_argument("--sweep", action="store_true", help="go over all")
    made.add_argument("--start", type=float, default=0.0, help="from when on")
    return made


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--output_dir", "x"], {"output_dir": "x"}),
        (["--output-dir=x"], {"output_dir": "x"}),
        (["output_dir=x"], {"output_dir": "x"}),
        (["output-dir=a=b"], {"output_dir": "a=b"}),
        (["a=b", "output_dir=x", "c=d"], {"output_dir": "x", "sets": ["a=b", "c=d"]}),
        (["a=b", "--output_dir", "x", "c=d"], {"output_dir": "x", "sets": ["a=b", "c=d"]}),
        (["seeds=3", "4"], {"seeds": [3, 4]}),
        (["--seeds", "3", "4", "start=-1"], {"seeds": [3, 4], "start": -1.0}),
        (["--set", "start=0.2", "output_dir=1"], {"set": ["start=0.2", "output_dir=1"], "start": 0.0}),
        (["--set", "strength=1", "--start", "0.5"], {"set": ["strength=1"], "start": 0.5}),
        (["--prompt", "start=1"], {"prompt": "start=1", "start": 0.0}),
        (["--prompt=a --b"], {"prompt": "a --b"}),
        (["sweep=true"], {"sweep": True}),
        (["--sweep=no"], {"sweep": False}),
        (["--sweep", "a=b"], {"sweep": True, "sets": ["a=b"]}),
    ],
)
def test_every_spelling(argv: list[str], expected: dict[str, Any]) -> None:
    found = vars(parser().read(argv))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output_dri", "x"], ["--output_dri", "did you mean --output_dir?"]),
        (["--out-put-dir", "x"], ["--out-put-dir", "--output_dir"]),
        (["--frobnicate"], ["--frobnicate", "see --help"]),
        (["--start", "late"], ["--start", "late", "see --help"]),
        (["sweep=perhaps"], ["--sweep", "perhaps", "true or false"]),
        (["--prompt"], ["--prompt", "see --help"]),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parser().read(argv)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().read(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "where to (default: out)" in text and "(default: 0 1)" in text and "go over all --start" in text


def test_a_name_is_suggested_only_when_it_is_near() -> None:
    known = ["loss.weight", "early_stopping.scheduler", "validation.scheduler", "learning_rate", "loss.filter"]
    assert nearest("weight", known) == "did you mean loss.weight?"
    assert nearest("scheduler", known) == "did you mean early_stopping.scheduler or validation.scheduler?"
    assert nearest("learning_rte", known) == "did you mean learning_rate?"
    assert nearest("scale_lr", known) == nearest("lr", known) == nearest("", known) == "see --help."
