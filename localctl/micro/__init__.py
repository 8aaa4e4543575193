"""The embedded base: procedural scenes, their reader, and the scripts that train a small Stable Diffusion on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localctl.lazy import lazy_names

if TYPE_CHECKING:
    from localctl.micro.scenes import Scene as Scene
    from localctl.micro.scenes import scene as scene

__getattr__, __dir__, __all__ = lazy_names(__name__, {"scenes": ["Scene", "scene"]})

PROFILES = ("basic", "rich")
SPLITS = ("train", "val", "test")
