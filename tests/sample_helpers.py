"""Pictures that ``sample.py`` has written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(folder: str | Path) -> dict[str, np.ndarray]:
    """By the name of their file; without the contact sheets."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*_seed*.png"))}


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first and first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
