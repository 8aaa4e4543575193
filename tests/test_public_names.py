"""Public names are found by dir(), by editors and type checkers, and load their module on first use alone."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import localctl

ROOT = Path(localctl.__file__).parent


@pytest.mark.parametrize("package", ["localctl", "localctl.data", "localctl.layout_predictor"])
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
