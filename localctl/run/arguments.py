"""Flags as all programs take them: ``--key value``, ``--key=value`` or ``key=value``, with dashes or underscores.

Programs whose settings are dataclasses read them by ``localctl.run.config``; this is for those with a few flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from localctl import __version__
from localctl.run.suggest import nearest

VERSION = f"localctl {__version__}"
_SEVERAL = ("+", "*")
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Arguments(argparse.ArgumentParser):
    """A parser whose ``read`` takes all spellings; every mistake is a ValueError in one sentence."""

    def __init__(self, program: str, description: str | None = None) -> None:
        super().__init__(prog=program, description=description, formatter_class=_Format, allow_abbrev=False)
        self.add_argument("--version", action="version", version=VERSION, help="print the version and end")

    def error(self, message: str) -> NoReturn:
        """What argparse calls when flags do not fit."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}; see --help.")

    def read(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The flags in ``argv`` (null: of the command line). ValueError for unknown ones, naming one that is near."""
        tokens = list(self._spelled(list(sys.argv[1:] if argv is None else argv)))
        options, rest = self.parse_known_intermixed_args(tokens)
        if rest:
            self.error(f"cannot read the argument {rest[0]!r}")
        return options

    def _spelled(self, argv: list[str]) -> Iterable[str]:
        """``argv`` as argparse wants it.

        Bare ``key=value`` is a flag where ``key`` is one, except right behind a flag that wants a value, and in the
        list of a flag whose values look like that themselves (``--set strength=0.6``).
        """
        wants, pairs = False, False  # the flag before still wants its value; its values are NAME=VALUE
        for position, token in enumerate(argv):
            if token == "--":
                yield from argv[position:]
                return
            name, equals, value = token.partition("=")
            marked = token.startswith("--") and " " not in name
            action = self._option_string_actions.get("--" + name.removeprefix("--").replace("-", "_"))
            if marked and action is None:
                raise ValueError(self._unknown(name))
            if action is None or not (marked or (equals and not wants and not pairs)):
                yield token
                wants = False
                continue
            flag = action.option_strings[-1]
            if action.nargs == 0:
                if not equals or _truth(flag, value):
                    yield flag
            elif equals and (action.nargs not in _SEVERAL or value.startswith("-")):
                yield f"{flag}={value}"
            else:
                yield from (flag, value) if equals else (flag,)
            wants = action.nargs != 0 and not equals
            pairs = action.nargs in _SEVERAL and "=" in str(action.metavar)

    def _unknown(self, name: str) -> str:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        return f"There is no flag {name!r}; {nearest('--' + name[2:].replace('-', '_'), known)}"


class _Format(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and every default shown."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or default == [] or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})".strip()


def _truth(flag: str, value: str) -> bool:
    if value.lower() not in _BOOLS:
        raise ValueError(f"{flag} must be true or false, not {value!r}.")
    return _BOOLS[value.lower()]
