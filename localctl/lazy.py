"""Names that have moved: each still works for one version, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved_names(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return ``__getattr__`` for a ``module`` whose names have moved; places: old name -> "new.module:new_name". Old
    names work for one more version, with a DeprecationWarning."""

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = places[name].partition(":")
        warnings.warn(f"{module}.{name} is now {place}.{new}.", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(place), new)

    return load
