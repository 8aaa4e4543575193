"""What an installed package holds: every module, the configuration, weights, and one command."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py

from localctl.cli.config import CONFIG_DIR

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def wheel_files() -> set[str]:
    """The files of a wheel, as setuptools would place them."""
    settings = PROJECT["tool"]["setuptools"]
    names = {"packages": "packages", "package_dir": "package-dir", "package_data": "package-data"}
    distribution = Distribution({name: settings[key] for name, key in names.items()})
    distribution.script_name = "setup.py"
    command = build_py(distribution)
    command.build_lib = "."
    command.ensure_finalized()
    return {Path(name).as_posix() for name in command.get_output_mapping()}


def test_a_wheel_holds_every_module_the_configuration_and_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = wheel_files()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "localctl").rglob("*.py")}
    settings = {f"localctl/config/{path.relative_to(CONFIG_DIR).as_posix()}" for path in CONFIG_DIR.rglob("*.yaml")}
    assert modules - found == set() and len(settings) > 60 and settings - found == set()
    assert {"localctl/py.typed", "localctl/cli/other_flags.json"} < found
    assert sum(name.endswith(".safetensors") for name in found) >= 4
    assert all(name.startswith("localctl/") for name in found)


def test_the_command_is_there() -> None:
    module, _, name = PROJECT["project"]["scripts"]["localctl"].partition(":")
    assert module == "localctl.__main__" and name == "main"
