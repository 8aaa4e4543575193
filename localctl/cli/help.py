"""The text of ``--help`` for programs with dataclasses of settings: groups, options, and a line for every setting.

Descriptions come from the docstrings of the dataclasses (``name: text``) and from the first comment of each YAML file.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

_NAME_WIDTH = 34  # columns of "key=default"


def help_text(
    usage: str, defaults: object, groups: Mapping[str, list[str]], config_dir: Path, aliases: Mapping[str, str]
) -> str:
    """Return the whole text: ``groups`` with their options, settings by section with ``defaults``, and other names."""
    lines = [f"usage: {usage} [group=option ...] [key=value ...] [--key value ...]"]
    if groups:
        lines += ["", "Groups of settings, chosen by group=option or --group option:"]
    for group, options in groups.items():
        summaries = {option: summary(config_dir / group / f"{option}.yaml") for option in options}
        lines.append(f"  {group}={'NAME' if all(summaries.values()) else '|'.join(options)}")
        lines += [line for option, text in summaries.items() if text for line in _entry(f"  {option}", text)]
    for title, prefix, section in sections(defaults):
        texts = descriptions(type(section))
        lines += ["", f"{title}, as key=value or --key value:"]
        for field in fields(section):  # type: ignore[arg-type]
            value = getattr(section, field.name)
            if not is_dataclass(value):
                lines += _entry(f"{prefix}{field.name}={_format(value)}", texts.get(field.name, ""))
    lines += ["", "Other names:"] if aliases else []
    lines += [line for flag, key in aliases.items() for line in _entry(f"--{flag}", f"for {key}")]
    lines += ["", "--version prints the version; --help prints this text."]
    return "\n".join(lines)


def sections(defaults: Any) -> list[tuple[str, str, Any]]:
    """Return (title, prefix of its keys, dataclass) of each section, the outermost first."""
    inner = [(field.name, getattr(defaults, field.name)) for field in fields(defaults)]
    return [("Settings", "", defaults)] + [
        (f"Settings of {name}", f"{name}.", value) for name, value in inner if is_dataclass(value)
    ]


def descriptions(schema: type) -> dict[str, str]:
    """Return field -> its description: the text after ``field: `` or ``field, other: `` in the docstring of the
    dataclass or of its bases."""
    names = "|".join(sorted((field.name for field in fields(schema)), key=len, reverse=True))  # type: ignore[arg-type]
    texts: dict[str, str] = {}
    for part in reversed([part for part in schema.__mro__ if is_dataclass(part)]):
        doc = " ".join((part.__doc__ or "").split())
        found = list(re.finditer(rf"(?<![\w.`-])((?:{names})(?:, (?:{names}))*): ", doc))
        ends = [*(match.start() for match in found[1:]), len(doc)]
        for match, end in zip(found, ends, strict=False):
            texts |= dict.fromkeys(match[1].split(", "), doc[match.end() : end].strip().replace("``", ""))
    return texts


def summary(path: Path) -> str:
    """Return the first comment of a YAML file in one line, "" if it has none."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#  "):
            break
        if not line.startswith("# @"):
            comment.append(line.lstrip("# "))
    return " ".join(comment)


def _format(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _entry(name: str, text: str) -> list[str]:
    """Return lines with ``name`` and the text beside it, or below a long name."""
    width = max(60, min(120, shutil.get_terminal_size((120, 24)).columns))
    lines = textwrap.wrap(text, width - _NAME_WIDTH - 3) or [""]
    head = f"  {name:<{_NAME_WIDTH}} {lines[0]}" if len(name) <= _NAME_WIDTH else f"  {name}"
    rest = lines[1:] if len(name) <= _NAME_WIDTH else [line for line in lines if line]
    return [head.rstrip(), *(" " * (_NAME_WIDTH + 3) + line for line in rest)]
