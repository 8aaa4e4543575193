"""The embedded base: procedural scenes, their reader, and the scripts that train a small Stable Diffusion on them."""

import lazy_loader as lazy

PROFILES = ("basic", "rich")
SPLITS = ("train", "val", "test")

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
