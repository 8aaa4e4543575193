"""The embedded base: its procedural scenes, the reader that detects their objects, and its weights."""

import lazy_loader as lazy

PROFILES = ("basic", "rich")
SPLITS = ("train", "val", "test")

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
