"""Public names are found by dir(), by editors and type checkers, and load their module on first use alone."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import localctl

ROOT = Path(localctl.__file__).parent


@pytest.mark.parametrize(
    "package", ["localctl", "localctl.data", "localctl.evaluation", "localctl.layout_predictor", "localctl.micro"]
)
def test_what_type_checkers_see_is_what_there_is(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.asname: node.module for alias in node.names if alias.asname == alias.name}
    assert sorted(seen) == module.__all__
    assert set(seen) <= set(dir(module))
    for name, place in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(place)), name)
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "torch", "numpy", "diffusers", "pydantic", "hydra"
    code = f"import sys, localctl; dir(localctl); print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.strip() == "[]"


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["localctl"]
