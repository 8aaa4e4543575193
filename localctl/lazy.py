"""Public names of a package that load their module on first use (PEP 562), so that importing the package is fast.

The package repeats the names under ``if TYPE_CHECKING:`` for editors and type checkers; a test compares the two.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, places: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__``, ``__all__`` for ``package``; ``places``: module in it -> names to export."""
    modules = {name: f"{package}.{module}" for module, names in places.items() for name in names}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *modules}), sorted(modules)


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
