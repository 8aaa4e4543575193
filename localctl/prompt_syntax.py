"""Marks in prompts: weights such as ``(word:1.3)``, which act here, and the syntax of other tools, which does not."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

from localctl.sizes import shown

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_END = r"(?=[\s,.)\]]|$)"
# At the end of "(words:1.3)"; a whole number after a digit is a time or a ratio, as in "(at 10:30)".
_WEIGHT_INSIDE = re.compile(rf"(?:(?<!\d):\s*{_NUMBER}|:\s*\d*\.\d+)\s*(?=\))")
_DECIMAL = r":[+-]?\d*\.\d+"  # without parentheses; a whole number is a chapter, a time or a port
# Example -> pattern. Plain parentheses, and brackets around a few letters as in "[V] dog", are ordinary text.
_SYNTAX = {
    "(word:1.3)": re.compile(rf"(?<=[^\W\d])(?:::{_NUMBER}|{_DECIMAL})(?!\w|:|\.\d|\s*[>\]])|{_WEIGHT_INSIDE.pattern}"),
    "((word))": re.compile(r"\(\([^()]*\)\)"),
    "[word]": re.compile(rf"\[(?!\w{{0,2}}\*?\])[^\[\]<>]*\](?!\()|\[[^\[\]]*:\s*{_NUMBER}\s*\]"),
    "<lora:name:0.8>": re.compile(r"<\s*[a-z]+\s*:[^<>]*>", re.IGNORECASE),
    "embedding:name": re.compile(r"(?<!\w)embedding:[\w./-]+", re.IGNORECASE),
    "{a|b}": re.compile(r"\{[^{}|]*\|[^{}]*\}"),
    "__wildcard__": re.compile(r"(?<!\w)__\w[\w/ -]{0,60}?__(?!\w)"),
    "word++": re.compile(rf"(?<=\w\w)\+{{2,}}{_END}|(?<=\))(?:[+-]+|{_NUMBER}){_END}"),
    "BREAK": re.compile(r"(?<!\w)(?:BREAK|ADD(?:COL|ROW|BASE|COMM))(?!\w)"),
    "AND": re.compile(r"(?<!\w)AND(?:_[A-Z]+)?(?!\w)"),
    ".and(1, 1)": re.compile(r"(?<=[\")'])\.(?:and|blend|swap)\([^()]*\)"),
    "--ar 16:9": re.compile(r"(?<!\S)--(?:ar|aspect|v|style|stylize|niji|seed|no|q|s|chaos)\s+[\w:.]+(?!\S)"),
}
# These contain no object of the scene.
_WHOLE = ("<lora:name:0.8>", "embedding:name", "{a|b}", "__wildcard__", ".and(1, 1)", "--ar 16:9")
_ENDS = ("BREAK", "AND")  # they end a phrase, unless the whole prompt is in capitals
_REGIONS = "place parts of the prompt by the regions of a layout"
_CHOICES = "give one prompt for each choice"
# What to do instead, where no weight is meant.
_WAYS = {
    "(word:1.3)": "put the weighted words in parentheses, as in (word:1.3)",
    "((word))": "write the weight as in (word:1.2)",
    "[word]": "for words in some of the steps only, give a region with start and end",
    "<lora:name:0.8>": "load a LoRA by --lora",
    "embedding:name": "load a learned word by --textual_inversion",
    "{a|b}": _CHOICES,
    "__wildcard__": _CHOICES,
    "word++": "write the weight as in (word:1.2)",
    "BREAK": _REGIONS,
    "AND": _REGIONS,
    ".and(1, 1)": _REGIONS,
    "--ar 16:9": "give sizes, seeds and the like as arguments of their own",
}
_MORE, _LESS = 1.1, 0.9  # factors of one "+" and one "-" as in compel, and of a pair of parentheses
_MOST = 10.0
_LONGEST = 64  # characters of a number, or of a word before "++"
_SHORT_NAME = re.compile(r"\w{0,2}\*?")
_ALTERNATES = re.compile(rf"\||:\s*{_NUMBER}\s*$|[<>]")
_ESCAPE = re.compile(r"\\[()\[\]\\]")
_SUFFIX = re.compile(rf"(?:[+-]+|{_NUMBER}){_END}")
_PLUSES = re.compile(rf"(?<=\w\w)(\+{{2,}}){_END}")


@dataclass(frozen=True)
class WeightedText:
    """A text without marks. weights: one for each character. places: of each character in the prompt."""

    text: str
    weights: tuple[float, ...]
    places: tuple[int, ...]

    @classmethod
    def plain(cls, text: str) -> WeightedText:
        """Return ``text`` as it is, all of it with weight 1."""
        return cls(text, (1.0,) * len(text), tuple(range(len(text))))

    @property
    def is_weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return any(weight != 1 for weight in self.weights)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The [first, last) characters of each stretch of equal weight; of an empty text (0, 0)."""
        starts = [0]
        for _, group in groupby(self.weights):
            starts.append(starts[-1] + len(list(group)))
        return list(pairwise(starts)) or [(0, 0)]

    def __add__(self, other: WeightedText) -> WeightedText:
        return WeightedText(self.text + other.text, self.weights + other.weights, self.places + other.places)

    def cut(self, first: int, last: int) -> WeightedText:
        """Return the characters [first, last)."""
        return WeightedText(self.text[first:last], self.weights[first:last], self.places[first:last])

    def without(self, spans: Iterable[tuple[int, int]]) -> WeightedText:
        """Return the text without the characters of these spans."""
        rest, end = self.cut(0, 0), 0
        for first, last in sorted(spans):
            rest, end = rest + self.cut(end, first), max(end, last)
        return rest + self.cut(end, len(self.text))

    def span(self, characters: tuple[int, int]) -> tuple[int, int]:
        """Return the [first, last) characters that were ``characters`` of the prompt."""
        inside = [index for index, place in enumerate(self.places) if characters[0] <= place < characters[1]]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


class _Group(NamedTuple):
    """A pair of parentheses or brackets around the characters [first + 1, last)."""

    first: int
    last: int


def read_weights(prompt: str) -> WeightedText:
    """Read the weights of ``prompt``, and remove their marks.

    ``(words:1.3)`` sets a weight; ``((words))`` multiplies by 1.1 for each of at least two pairs of parentheses,
    ``[words]`` divides by 1.1; ``word++``, ``(words)++``, ``(words)--`` and ``(words)1.3`` are those of compel. Nested
    weights are multiplied. A backslash makes a parenthesis or bracket ordinary text.
    """
    if not any(mark in prompt for mark in "()[]+\\"):
        return WeightedText.plain(prompt)
    escapes = [match.start() for match in _ESCAPE.finditer(prompt)]
    dropped, literal = set(escapes), {place + 1 for place in escapes}
    weights = [1.0] * len(prompt)
    marks = [*_parentheses(prompt, literal), *_brackets(prompt, literal)]
    for match in _PLUSES.finditer(prompt):
        word = re.split(r"[^\w'-]", prompt[max(0, match.start() - _LONGEST) : match.start()])[-1]
        group = _Group(match.start() - len(word) - 1, match.start())
        marks.append((group, _MORE ** len(match[1]), range(*match.span())))
    for (first, last), weight, places in marks:
        dropped.update(places)
        for place in range(first + 1, last):
            weights[place] *= weight
    kept = [place for place in range(len(prompt)) if place not in dropped]
    return WeightedText(
        "".join(prompt[place] for place in kept), tuple(round(weights[place], 9) for place in kept), tuple(kept)
    )


_Mark = tuple[_Group, float, Sequence[int]]  # what has the weight, the weight, and the places of the mark's characters


def _parentheses(prompt: str, literal: set[int]) -> list[_Mark]:
    """Return the marks in parentheses."""
    groups = _groups(prompt, "()", literal)
    exact = {group for group in groups if _Group(group.first + 1, group.last - 1) in groups}
    marks: list[_Mark] = []
    for group in groups:
        first, last = group
        near = _WEIGHT_INSIDE.finditer(prompt, max(first + 1, last - _LONGEST), last + 1)
        inside = next((match for match in near if match.end() == last), None)
        suffix = _SUFFIX.match(prompt, last + 1)
        if inside is not None:
            weight, end, around = float(inside[0].strip(": \t\n")), last + 1, inside.start()
        elif suffix is not None:
            weight, end, around = _of_suffix(suffix[0]), suffix.end(), last
        elif group in exact or _Group(first - 1, last + 1) in exact:
            weight, end, around = _MORE, last + 1, last
        else:
            continue
        marks.append((group, weight, [first, *range(around, end)]))
    return marks


def weigh_parentheses(prompt: str) -> str:
    """Write the weight of 1.1 into plain parentheses, ``(word)``: text here, but marks in the web UI's prompts."""
    literal = {match.end() - 1 for match in _ESCAPE.finditer(prompt)}
    read = {group for group, _, _ in _parentheses(prompt, literal)}
    for last in sorted((group.last for group in _groups(prompt, "()", literal) - read), reverse=True):
        prompt = f"{prompt[:last]}:{_MORE}{prompt[last:]}"
    return prompt


def _brackets(prompt: str, literal: set[int]) -> list[_Mark]:
    """Return the marks in brackets."""
    marks: list[_Mark] = []
    for group in _groups(prompt, "[]", literal):
        content = prompt[group.first + 1 : group.last]
        link = prompt[group.last + 1 : group.last + 2] == "("
        if not (link or _SHORT_NAME.fullmatch(content) or _ALTERNATES.search(content)):
            marks.append((group, 1 / _MORE, group))
    return marks


def _groups(prompt: str, pair: str, literal: set[int]) -> set[_Group]:
    """Return the groups in parentheses or brackets; one without its partner is text."""
    found, opened = set(), []
    for place, letter in enumerate(prompt):
        if place in literal:
            continue
        if letter == pair[0]:
            opened.append(place)
        elif letter == pair[1] and opened:
            found.add(_Group(opened.pop(), place))
    return found


def _of_suffix(suffix: str) -> float:
    """Return the weight of compel's mark behind a parenthesis: pluses, minuses or a number."""
    if set(suffix) <= set("+-"):
        return math.prod(_MORE if sign == "+" else _LESS for sign in suffix)
    return float(suffix)


def refuse_foreign(prompt: str, text: WeightedText) -> None:
    """Raise a ValueError for syntax in ``prompt`` that has no meaning here, or a weight out of range.

    ``text``: as :func:`read_weights` returns it.
    """
    for weight in text.weights:
        if not 0 <= weight <= _MOST:
            raise ValueError(
                f"The prompt {shown(prompt)} has a weight of {weight:g}; give weights from 0 to {_MOST:g}."
            )
    escaped = {match.end() - 1 for match in _ESCAPE.finditer(prompt)}
    used = set(text.places) - escaped
    rest = "".join(letter if place in used else " " for place, letter in enumerate(prompt))
    for kind in foreign_syntax(rest):
        found = _SYNTAX[kind].search(rest)
        assert found is not None
        raise ValueError(
            f"The prompt {shown(prompt)} has {shown(found[0])}, syntax of other tools; {_WAYS[kind]}, or read it as "
            "text with prompt_weighting=false."
        )


def foreign_syntax(prompt: str) -> list[str]:
    """Return an example of each kind of syntax in ``prompt`` that prompts of other tools use for weights, networks,
    parts or choices."""
    capitals = prompt == prompt.upper()
    return [name for name, pattern in _SYNTAX.items() if not (capitals and name in _ENDS) and pattern.search(prompt)]


def warn_of_syntax(prompts: Iterable[str]) -> None:
    """Warn once of all such syntax in ``prompts``, which are read as text."""
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
