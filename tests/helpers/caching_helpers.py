"""Small caches: settings, and the bytes of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_helpers import tiny_settings

from localctl.caching.settings import CacheSettings
from localctl.data import DataConfig


def cache_settings(base: Path, folder: Path, data: DataConfig, **changes: Any) -> CacheSettings:
    """Encode in this process, without Ray, unless ``num_workers`` says otherwise."""
    training = vars(tiny_settings(base, folder.parent / "unused", data=data_with(data, folder)))
    return CacheSettings(**(training | {"num_workers": 0} | changes))


def data_with(data: DataConfig, folder: Path | None) -> DataConfig:
    """The same data with encodings in ``folder``."""
    return DataConfig(**(vars(data) | {"encodings_dir": None if folder is None else str(folder)}))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a cache by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
