"""Sets of generated images in tests."""

from __future__ import annotations

from pathlib import Path

SIDE = 64  # pixels of their photos


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files except the timings."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "timing"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
