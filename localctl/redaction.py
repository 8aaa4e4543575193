"""Settings as they may be written down: plain values, flat or nested, without secrets.

Two kinds of values are masked wherever settings are logged, saved or pushed: texts that a configuration file took from
the environment (``${oc.env:NAME}``), and whatever stands under a name with token, key, secret or password in it
(``key_column`` names a column).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

MASKED = "***"
_SECRET = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|passphrase|credentials?|key)$|(^|[_.-])(secret|password)[_.-]",
    re.IGNORECASE,
)
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b")


class FromEnvironment(str):
    """A text that came from the environment: used as any other, never written down."""


def mark_environment(raw: Any, resolved: Any) -> Any:
    """``resolved`` with the texts that interpolation took from the environment, directly or by way of another
    setting, as :class:`FromEnvironment`. ``raw``: the same before interpolation."""
    taken = [value for text, value in _pairs(raw, resolved) if _FROM_ENVIRONMENT.search(text) and value]

    def mark(before: Any, after: Any) -> Any:
        if isinstance(after, Mapping):
            return {name: mark(before[name] if isinstance(before, Mapping) else before, after[name]) for name in after}
        if isinstance(after, list):
            inner = before if isinstance(before, list) else [before] * len(after)
            return [mark(*pair) for pair in zip(inner, after, strict=True)]
        if isinstance(after, str) and "${" in str(before) and any(value in after for value in taken):
            return FromEnvironment(after)
        return after

    return mark(raw, resolved)


def _pairs(raw: Any, resolved: Any) -> list[tuple[str, str]]:
    """(text before, text after interpolation) of every text in the tree."""
    if isinstance(raw, Mapping) and isinstance(resolved, Mapping):
        return [pair for name in resolved for pair in _pairs(raw[name], resolved[name])]
    if isinstance(raw, list) and isinstance(resolved, list):
        return [pair for item in zip(raw, resolved, strict=True) for pair in _pairs(*item)]
    return [(raw, resolved)] if isinstance(raw, str) and isinstance(resolved, str) else []


def recorded(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as nested dicts of plain values (tuples as lists), secrets masked."""
    return _plain(asdict(settings))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level with dotted names."""
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
