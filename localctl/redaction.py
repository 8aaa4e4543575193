"""Settings for logs and files: plain values, flat or nested, with secrets masked.

Two kinds of values are masked wherever settings are logged, saved or uploaded: texts that a configuration file takes
from the environment (``${oc.env:NAME}``), and values whose name ends in token, key or credentials, or contains secret
or password. (``key_column``, which names a column, is not masked.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

MASKED = "***"
_SECRET = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|passphrase|credentials?|key)$|(^|[_.-])(secret|password)[_.-]",
    re.IGNORECASE,
)
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b")


class FromEnvironment(str):
    """A text from the environment: used like any other text, but never logged or saved."""


def mark_environment(raw: Any, resolved: Any) -> Any:
    """Return ``resolved`` with every text that interpolation took from the environment, directly or through another
    setting, as :class:`FromEnvironment`. ``raw``: the settings before interpolation."""
    taken: list[str] = []

    def note(before: Any, after: Any) -> None:
        if isinstance(after, str) and after and _FROM_ENVIRONMENT.search(str(before)):
            taken.append(after)

    def mark(before: Any, after: Any) -> Any:
        masked = isinstance(after, str) and "${" in str(before) and any(value in after for value in taken)
        return FromEnvironment(after) if masked else after

    _map(note, raw, resolved)
    return _map(mark, raw, resolved)


def _map(change: Callable[[Any, Any], Any], raw: Any, resolved: Any) -> Any:
    """Return ``resolved`` with each leaf replaced by ``change(raw leaf, leaf)``."""
    if isinstance(resolved, Mapping):
        return {k: _map(change, raw[k] if isinstance(raw, Mapping) else raw, v) for k, v in resolved.items()}
    if isinstance(resolved, list):
        inner = raw if isinstance(raw, list) else [raw] * len(resolved)
        return [_map(change, *pair) for pair in zip(inner, resolved, strict=True)]
    return change(raw, resolved)


def recorded(settings: Any) -> dict[str, Any]:
    """Return a dataclass of settings as nested dicts of plain values (tuples as lists), with secrets masked."""
    return _plain(asdict(settings))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one dict with dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + str(name)] = value
    return result


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, FromEnvironment) or (_SECRET.search(name) and value is not None):
        return MASKED
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
