"""Rooms import only from the floors below them: the contracts in pyproject.toml. Files and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_contract_is_kept():
    """In a process of its own: import-linter disables the loggers that exist."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_at_most_nine_floors():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (floors,) = (contract["layers"] for contract in contracts if contract["id"] == "floors")
    assert len(floors) <= 9


def test_no_function_has_over_60_lines_and_no_file_over_350():
    long = []
    for folder in ("localctl", "research", "tests", "data", "nbs", "config", "."):
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            text = path.read_text()
            found = [(path.name, len(text.splitlines()), 350)]
            for node in ast.walk(ast.parse(text if found[0][1] > 60 else "")):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.append((f"{path.name}: {node.name}", (node.end_lineno or 0) - node.lineno + 1, 60))
            long += [f"{name} has {lines} lines, over {limit}" for name, lines, limit in found if lines > limit]
    assert not long
