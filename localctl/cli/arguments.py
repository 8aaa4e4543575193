"""Flags as all programs take them: ``--key value``, ``--key=value`` or ``key=value``, with dashes or underscores.

Programs whose settings are dataclasses read them by ``localctl.cli.config``; this is for those with a few flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from localctl import __version__
from localctl.messages import nearest

VERSION = f"localctl {__version__}"
_SEVERAL = ("+", "*")
BOOLS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


class Arguments(argparse.ArgumentParser):
    """A parser whose ``read`` takes all spellings; every mistake is a ValueError in one sentence."""

    def __init__(self, program: str, description: str | None = None, **options: Any) -> None:
        """``options``: more of ``argparse.ArgumentParser``."""
        super().__init__(prog=program, description=description, formatter_class=_Format, allow_abbrev=False, **options)
        said = "print the version and end"
        self.add_argument("--version", action="version", version=VERSION, dest=argparse.SUPPRESS, help=said)

    def error(self, message: str) -> NoReturn:
        """What argparse calls when flags do not fit."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}; see --help.")

    def read(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The flags in ``argv`` (None: of the command line). ValueError for unknown ones, naming one that is near."""
        tokens = self.spelled(sys.argv[1:] if argv is None else argv)
        for token in tokens[: tokens.index("--") if "--" in tokens else None]:
            name = token.partition("=")[0]
            if token.startswith("--") and " " not in name and name not in self._option_string_actions:
                raise ValueError(self._unknown(name))
        options, rest = self.parse_known_intermixed_args(tokens)
        if rest:
            self.error(f"cannot read the argument {rest[0]!r}")
        return options

    def spelled(self, argv: Sequence[str]) -> list[str]:
        """``argv`` as argparse wants it; what is no flag here stays as it is.

        Bare ``key=value`` is a flag where ``key`` is one, except right behind a flag that wants a value, and in the
        list of a flag whose values look like that themselves (``--set strength=0.6``).
        """
        tokens: list[str] = []
        wants, pairs = False, False  # the flag before still wants its value; its values are NAME=VALUE
        for position, token in enumerate(argv):
            if token == "--":
                return [*tokens, *argv[position:]]
            name, equals, value = token.partition("=")
            marked = token.startswith("--") and " " not in name
            action = self._option_string_actions.get("--" + name.removeprefix("--").replace("-", "_"))
            if action is None or not (marked or (equals and not wants and not pairs)):
                tokens.append(token)
                wants = False
                continue
            tokens += _flag(action, equals, value)
            wants = action.nargs != 0 and not equals
            pairs = action.nargs in _SEVERAL and "=" in str(action.metavar)
        return tokens

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


def _flag(action: argparse.Action, equals: str, value: str) -> list[str]:
    """A flag with what stands behind its "=", as argparse reads it."""
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag] if not equals or _truth(flag, value) else []
    if equals and (action.nargs not in _SEVERAL or value.startswith("-")):
        return [f"{flag}={value}"]
    return [flag, value] if equals else [flag]


def _truth(flag: str, value: str) -> bool:
    if value.lower() not in BOOLS:
        raise ValueError(f"{flag} must be true or false, not {value!r}.")
    return BOOLS[value.lower()]
