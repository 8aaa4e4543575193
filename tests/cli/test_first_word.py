"""Every program answers before it loads torch: `--help`, `--version`, and a mistake in the flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from localctl.__main__ import COMMANDS, PROGRAMS, main

ROOT = Path(__file__).resolve().parents[2]
PROGRAM_NAMES = {name.removeprefix("python ").removeprefix("-m ") for part in PROGRAMS.values() for name in part}
HEAVY = ("torch", "diffusers", "transformers", "kornia", "torchmetrics", "datasets", "scipy")

# In one process, for imports take their time. A program's own arguments come before the mistake.
_ASK = """
import contextlib, importlib, importlib.util, io, json, sys
sys.path.insert(0, "data")
answers = {}
for command in json.loads(sys.argv[1]):
    place, *first = command.split()
    name = place.removesuffix(".py").rsplit("/", 1)[-1]
    package = importlib.util.find_spec(name) if place == name else None
    module = importlib.import_module(f"{name}.__main__" if package and package.submodule_search_locations else name)
    for ask in ("--help", "--version", "--no_such_flag"):
        argv = [*first, *{"evaluate_fid": ["gen"]}.get(name, []), ask]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = module.main(argv)
            except SystemExit as end:  # argparse's way after --help
                code = end.code or 0
        answers[f"{command} {ask}"] = [code, out.getvalue(), err.getvalue()]
answers["loaded"] = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, list]:
    commands = sorted(PROGRAM_NAMES)
    argv = [sys.executable, "-c", _ASK, json.dumps(commands), json.dumps(HEAVY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_nothing_heavy_is_loaded_before_the_flags_are_read(answers: dict[str, list]) -> None:
    assert answers.pop("loaded") == []


def test_every_program_explains_itself_and_says_its_version(answers: dict[str, list]) -> None:
    asked = {name: answer for name, answer in answers.items() if name.endswith(("--help", "--version"))}
    assert len(asked) >= 38
    for name, (code, out, err) in asked.items():
        assert code == 0 and err == "", name
        if name.endswith("--version"):
            assert out.startswith("localctl ") and out.count("\n") == 1, name
        else:
            assert "usage: " in out and "--version" in out, name


def test_a_mistake_in_the_flags_is_one_sentence(answers: dict[str, list]) -> None:
    asked = {name: answer for name, answer in answers.items() if name.endswith("--no_such_flag")}
    for name, (code, out, err) in asked.items():
        assert code == 2 and out == "" and err.count("\n") == 1, (name, err)
        assert "--no_such_flag" in err and len(err) < 160, err


def test_the_overview_names_every_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    beside = (path for folder in (".", "data") for path in (ROOT / folder).glob("*.py"))
    scripts = {path.relative_to(ROOT).as_posix() for path in beside if "__main__" in path.read_text()}
    every = (path for folder in ("localctl", "research") for path in (ROOT / folder).rglob("*.py"))
    packages = (
        path for path in every if 'if __name__ == "__main__"' in path.read_text() and path.parent.name != "benchmarks"
    )
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in packages}
    modules = {name.removesuffix(".__main__") for name in modules} - {"localctl"}
    assert scripts | modules == {name.split()[0] for name in PROGRAM_NAMES}
    assert all(f"{name} " in shown for name in (*PROGRAM_NAMES, *COMMANDS))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train_adaptr"], "train_adapter?"),
        (["trian", "seed=1"], "no command 'trian'; did you mean train?"),
        (["check_dat"], "check-data?"),
        (["evaluate"], "fid or metrics;"),
        (["evaluate", "fdi"], "fid or metrics, not 'fdi'"),
        (["xyzzy"], "see --help"),
    ],
)
def test_what_is_no_command_is_said(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert words[-1].partition("=")[0] in error or "trian" in error
    assert hint in error and error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_calls_itself_by_its_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*command.split(), *(["gen"] if command == "evaluate fid" else [])]
    with suppress(SystemExit):  # argparse's way after --help
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert f"usage: localctl {command}" in shown and "python sample.py" not in shown
    assert main([*words, "--no_such_flag"]) == 2
    assert capsys.readouterr().err.startswith(f"localctl {command}: ")


def test_the_commands_of_one_kind_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    assert capsys.readouterr().out.count("evaluate ") == 2
