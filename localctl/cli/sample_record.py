"""The record of a run of ``sample.py``: the options that repeat it. What it holds are values, never flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from localctl.files import first_line, read_json

RECORD = "sample.json"
INPUTS = ("image", "condition_image", "mask", "layout")  # options that name files; copied beside the record
AUTO = "auto"  # in place of a layout: what the predictor makes of the prompt
NONE = "none"  # in place of a control


def read_record(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options in a record, those that say nothing left out; relative input files are looked up beside it.

    path: of the record, or of its folder. parser: knows every option and its kind. ValueError in one sentence for a
    file that is no record, an option nobody knows, or a value of another kind.
    """
    path = path.expanduser()
    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"The record {path} cannot be read (no such file); give the {RECORD} of an earlier run.")
    try:
        content = read_json(path, "The record")
    except ValueError as error:
        raise ValueError(f"{path} is not a record of sample.py ({first_line(error)}); give a {RECORD}.") from error
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"{path} is not a record of sample.py; give the {RECORD} of an earlier run.")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    found = {}
    for name, value in options.items():
        if name not in actions:
            raise ValueError(f"The record {path} has an option {name[:80]!r}, which sample.py has not; remove it.")
        if value is not None and name != "from_json":
            found[name] = _value(path, name, value, actions[name])
    for name in INPUTS:
        if name in found:
            found[name] = [item if item == AUTO else str(path.parent / item) for item in found[name]]
    return found


def _value(path: Path, name: str, value: Any, action: argparse.Action) -> Any:
    if action.nargs != "+":
        return _single(path, name, value, action)
    return [_single(path, name, item, action) for item in (value if isinstance(value, list) else [value])]


def _single(path: Path, name: str, value: Any, action: argparse.Action) -> Any:
    """One value of the kind that the flag takes."""
    kind = action.type
    try:
        if kind is None:
            if not isinstance(value, str):
                raise TypeError("text")
            read: Any = value
        else:
            if isinstance(value, (list, dict)) or value is None:
                raise TypeError("a single value")
            assert callable(kind)
            read = kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name!r} in the record {path}: {error}.") from error
    except (TypeError, ValueError) as error:
        wanted = error if isinstance(error, TypeError) else "a number"
        raise ValueError(f"{name!r} in the record {path} is {str(value)[:60]!r} where {wanted} belongs.") from error
    if action.choices is not None and read not in action.choices:
        raise ValueError(f"{name!r} in the record {path} is {str(read)[:60]!r}; choose {', '.join(action.choices)}.")
    return read
