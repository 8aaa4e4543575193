"""The embedded base: procedural scenes, their reader, and the scripts that train a small Stable Diffusion on them."""

PROFILES = ("basic", "rich")
SPLITS = ("train", "val", "test")
