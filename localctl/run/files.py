"""Files as others may need to read them."""

from __future__ import annotations

import stat
from pathlib import Path


def share_weights(folder: Path) -> None:
    """Give weights in ``folder`` the access rights of the configuration beside them, which follow the user's umask:
    safetensors makes its files readable by their owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(stat.S_IMODE((path.parent / "config.json").stat().st_mode))
