from .scenes import Scene as Scene
from .scenes import scene as scene

PROFILES: tuple[str, ...]
SPLITS: tuple[str, ...]
