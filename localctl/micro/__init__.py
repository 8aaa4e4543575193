"""The embedded base: its procedural scenes, the reader that detects their objects, and its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localctl.lazy import lazy_names

if TYPE_CHECKING:
    from localctl.micro.scenes import Scene as Scene
    from localctl.micro.scenes import scene as scene

__getattr__, __dir__, __all__ = lazy_names(__name__, {"scenes": ["Scene", "scene"]})

PROFILES = ("basic", "rich")
SPLITS = ("train", "val", "test")
