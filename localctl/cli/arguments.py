"""Parse flags in the spellings of all programs: ``--key value``, ``--key=value`` or ``key=value``, with dashes or
underscores.

This parser is for programs with a few flags; programs with dataclasses of settings use ``localctl.cli.config``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from localctl import __version__
from localctl.messages import nearest
from localctl.sizes import typed_size

VERSION = f"localctl {__version__}"
_SEVERAL = ("+", "*")
BOOLS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


class Arguments(argparse.ArgumentParser):
    """A parser whose ``read`` accepts all spellings; every user's error is a ValueError in one sentence."""

    def __init__(self, program: str, description: str | None = None, **options: Any) -> None:
        """Create the parser. ``options``: further arguments of ``argparse.ArgumentParser``."""
        super().__init__(prog=program, description=description, formatter_class=_Format, allow_abbrev=False, **options)
        text = "print the version and exit"
        self.add_argument("--version", action="version", version=VERSION, dest=argparse.SUPPRESS, help=text)

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError; argparse calls this for invalid flags."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}; see --help.")

    def read(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse ``argv`` (None: the command line). ValueError for an unknown flag, naming a similar one."""
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
        """Return ``argv`` in the spelling of argparse; tokens that are no known flag are unchanged.

        ``key=value`` without dashes is a flag if ``key`` is one, except directly after a flag that needs a value, and
        among the values of a flag that takes NAME=VALUE itself (``--set strength=0.6``).
        """
        tokens: list[str] = []
        wants, pairs = False, False  # whether the last flag still needs its value; whether its values are NAME=VALUE
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
    """Keep line breaks of descriptions, and append defaults to help texts."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or default == [] or "default" in text:
            return text
        value = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {value.replace('%', '%%')})".strip()


def _flag(action: argparse.Action, equals: str, value: str) -> list[str]:
    """Return the tokens for argparse of a flag and the value after its "="."""
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


def boolean(text: str) -> bool:
    """Read true or false, in the spellings of all programs. ArgumentTypeError for other text."""
    if text.lower() not in BOOLS:
        raise argparse.ArgumentTypeError(f"expected true or false, not {shortened(text)!r}")
    return BOOLS[text.lower()]


def size(text: str) -> tuple[int, int]:
    """Read (height, width) from the side of a square or WIDTHxHEIGHT. ArgumentTypeError for other text."""
    found = typed_size(text) or (typed_size(f"{text}x{text}") if text.strip().isascii() else None)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)!r} is not a size; write 512 or WIDTHxHEIGHT such as 512x768"
        )
    return found


def shortened(text: str) -> str:
    """Return ``text``, or the beginning of a long one."""
    return text if len(text) <= 80 else f"{text[:77]}..."
