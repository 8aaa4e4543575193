"""Images that ``sample.py`` has written, and its refusals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import localctl.jobs.generate
from localctl.cli import sample

CANNY: dict[str, Any] = {"kind": "canny", "low": 20, "high": 60}
QUICK = ["--num_inference_steps", "2"]
PLAIN = ["--prompt", "a b", "--base", "base", *QUICK]  # in the folder of the fixture ``base_here``


def pixels(folder: str | Path) -> dict[str, np.ndarray]:
    """Read the images of a folder, by file name; without the contact sheets."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*_seed*.png"))}


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first and first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def refused_early(
    argv: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Assert that ``sample.py`` prints one sentence that ``message`` matches, before it loads the base."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(localctl.jobs.generate, "load_pipeline", never)
    capsys.readouterr()  # of building the base
    assert sample.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err
