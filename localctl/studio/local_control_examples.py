"""Example photos of the tab Local control: embedded scenes that no training has seen, each with its caption."""

from __future__ import annotations

from PIL import Image

_SCENES = (19, 15, 14, 7, 4, 17)  # of the split test


def examples() -> list[tuple[Image.Image, str]]:
    """Return the image and the caption of each example."""
    from localctl.micro.scenes import scene

    found = [scene(index, split="test") for index in _SCENES]
    return [(Image.fromarray(item.image), item.caption) for item in found]
