"""Prompt syntax of other tools, such as weights, that diffusers does not support: detect, warn of and remove it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from localctl.sizes import shown

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
# Example -> pattern. Plain parentheses, and brackets around a few letters as in "[V] dog", are ordinary text.
_SYNTAX = {
    "(word:1.3)": re.compile(rf"(?<=[^\W\d])::?{_NUMBER}(?!\w|:|\.\d|\s*[>\]])|:\s*{_NUMBER}\s*(?=\))"),
    "((word))": re.compile(r"\(\([^()]*\)\)"),
    "[word]": re.compile(rf"\[(?!\w{{0,2}}\*?\])[^\[\]<>]*\](?!\()|\[[^\[\]]*:\s*{_NUMBER}\s*\]"),
    "<lora:name:0.8>": re.compile(r"<\s*[a-z]+\s*:[^<>]*>", re.IGNORECASE),
    "embedding:name": re.compile(r"(?<!\w)embedding:[\w./-]+", re.IGNORECASE),
    "{a|b}": re.compile(r"\{[^{}|]*\|[^{}]*\}"),
    "__wildcard__": re.compile(r"(?<!\w)__\w[\w/ -]{0,60}?__(?!\w)"),
    "word++": re.compile(rf"(?<=\w\w)\+{{2,}}(?=[\s,.)]|$)|(?<=\))(?:[+-]+|{_NUMBER})(?=[\s,.)]|$)"),
    "BREAK": re.compile(r"(?<!\w)(?:BREAK|ADD(?:COL|ROW|BASE|COMM))(?!\w)"),
    "AND": re.compile(r"(?<!\w)AND(?:_[A-Z]+)?(?!\w)"),
    ".and(1, 1)": re.compile(r"(?<=[\")'])\.(?:and|blend|swap)\([^()]*\)"),
    "--ar 16:9": re.compile(r"(?<!\S)--(?:ar|aspect|v|style|stylize|niji|seed|no|q|s|chaos)\s+[\w:.]+(?!\S)"),
}
# These contain no object of the scene.
_WHOLE = ("<lora:name:0.8>", "embedding:name", "{a|b}", "__wildcard__", ".and(1, 1)", "--ar 16:9")
_ENDS = ("BREAK", "AND")  # they end a phrase, unless the whole prompt is in capitals


def foreign_syntax(prompt: str) -> list[str]:
    """Return an example of each kind of syntax in ``prompt`` that other tools read as weights, networks, parts or
    choices."""
    capitals = prompt == prompt.upper()
    return [name for name, pattern in _SYNTAX.items() if not (capitals and name in _ENDS) and pattern.search(prompt)]


def warn_of_syntax(prompts: Iterable[str]) -> None:
    """Warn once of all such syntax in ``prompts``."""
    kinds: dict[str, str] = {}
    for prompt in prompts:
        for kind in foreign_syntax(prompt):
            kinds.setdefault(kind, prompt)
    if kinds:
        warnings.warn(
            f"The prompt {shown(next(iter(kinds.values())))} has syntax of other tools (such as {', '.join(kinds)}), "
            "which has no effect here but is read as text; remove it, or set the strength of a region.",
            stacklevel=2,
        )


def without_syntax(prompt: str) -> str:
    """Replace such syntax in ``prompt`` by blanks, so that offsets do not change; weighted words stay."""
    for name in foreign_syntax(prompt):
        if name in _WHOLE or name in ("(word:1.3)", "word++"):
            prompt = _SYNTAX[name].sub(lambda match: " " * len(match[0]), prompt)
        elif name in _ENDS:
            prompt = _SYNTAX[name].sub(lambda match: "," * len(match[0]), prompt)
        elif name == "[word]":
            prompt = re.sub(rf":\s*{_NUMBER}\s*(?=\])", lambda match: " " * len(match[0]), prompt)
    return prompt
