"""Find the phrases of a prompt that place something, in the words of ``mentions``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from localctl.layout_predictor import relations as r

_THING = r"(?:(?:both|all|each|either|the \w+) of )?<(?P<ground>\d+)>"
_LATERAL = r"(?P<side>left|right)(?:-hand|most)?(?: hand)?(?: (?:side|half|end|edge|flank|part|corner|third|bank))?"
_CORNER = r"(?P<row>upper|lower|top|bottom)[ -]"
_ROWS = {"upper": r.ABOVE, "top": r.ABOVE, "lower": r.BELOW, "bottom": r.BELOW}
_AT = r"\b(?:(?:the|at|in|to|on|from|its|my|your|far|very|extreme|immediate) )+"
_IMAGE = r"(?: of (?:the )?(?:image|picture|photo|frame|scene|canvas|page|view))?"
_OWN = r"(?:(?!to |on |at |in |the |a )\w+ ){0,2}?"  # "its immediate left", but not "the cat's to the left"
_DENIED = re.compile(r"\b(?:not|never|isn't|wasn't|aren't|weren't)(?: (?:to|on|at|the|directly|exactly|quite))* $")
_BODY = "(?:shoulder|foot|leg|eye|ear|hand|arm|hip|knee)"
_VERTICAL = {"above": r.ABOVE, "over": r.ABOVE, "below": r.BELOW, "beneath": r.BELOW, "under": r.BELOW}


@dataclass(frozen=True)
class Side:
    """A phrase that places something: tokens [start, end).

    kind: ``relation``, ``place`` (in the image), ``between``, ``stranded`` ("the bridge she sits on"), ``from``
    ("it watches her from above") or ``list`` (``order``: the side of the first of them).
    sides: usually one; "above and to the left of" has two. ground: number of a mention inside the phrase ("to its
    left"). forward: the ground follows. owned: tokens of mentions inside the phrase. certain: as in ``Relation``.
    """

    start: int
    end: int
    kind: str
    sides: tuple[str, ...]
    ground: int | None = None
    forward: bool = False
    certain: bool = True
    touching: bool = False
    order: str | None = None

    @property
    def is_place(self) -> bool:
        return self.kind == "place"

    @property
    def owned(self) -> range:
        """The tokens of a ground that the phrase contains."""
        return range(self.start, self.end) if self.ground is not None else range(0)


def find_sides(tokens: list[str]) -> list[Side]:
    """Return the phrases that place something, in reading order. Where two overlap, the first pattern wins."""
    text = " ".join(tokens) + " ."
    starts: dict[int, int] = {}
    at = 0
    for index, token in enumerate([*tokens, "."]):
        starts[at] = index
        at += len(token) + 1
    taken: set[int] = set()
    found: list[Side] = []
    for pattern, make in _patterns():
        for match in pattern.finditer(text):
            whole = _without_ground(match)
            first = starts.get(whole[0])
            if first is None:
                continue
            last = first + len(text[whole[0] : whole[1]].split())
            denied = _DENIED.search(text[: whole[0]]) is not None
            if not taken & set(range(first, last)) and not denied and (side := make(match, first, last)) is not None:
                taken |= set(range(first, last))
                found.append(side)
    return sorted(found, key=lambda side: side.start)


def _without_ground(match: re.Match[str]) -> tuple[int, int]:
    """Return the characters of a match without the ground that follows it, which others may refer to."""
    groups = match.groupdict()
    if groups.get("ground") is not None and match.end() == match.end("ground") + 1:
        return match.start(), match.start("ground") - 1
    return match.span()


Maker = Callable[[re.Match[str], int, int], Side | None]


def _names(match: re.Match[str]) -> tuple[str, ...]:
    """Return the sides that a match names by its groups ``row``, ``side`` and ``vertical``."""
    groups = match.groupdict()
    rows = [_ROWS[groups["row"]]] if groups.get("row") else []
    rows += [_VERTICAL[groups["vertical"]]] if groups.get("vertical") else []
    return (*rows, *([groups["side"]] if groups.get("side") in (r.LEFT, r.RIGHT) else []))


def _forward(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "relation", _names(match), forward=True)


def _inverse(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "relation", tuple(r.INVERSE[name] for name in _names(match)), forward=True)


def _own(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "relation", _names(match), ground=int(match["ground"]))


def _hand(match: re.Match[str], start: int, end: int) -> Side:
    """Return the side of a person's hand: their right one is on the left of an image. Writers differ."""
    return Side(start, end, "relation", (r.INVERSE[match["side"]],), int(match["ground"]), certain=False)


def _place(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "place", _names(match))


def _from(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "from", _names(match))


def _feet(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "relation", (r.BELOW,), ground=int(match["ground"]))


def _nothing(match: re.Match[str], start: int, end: int) -> Side:
    """Return a phrase without a side: "over their left shoulder"."""
    return Side(start, end, "relation", (), ground=int(match["ground"]))


def _order(match: re.Match[str], start: int, end: int) -> Side | None:
    sides = {"left": r.LEFT, "right": r.RIGHT, "top": r.ABOVE, "bottom": r.BELOW}
    first, second = sides[match["first"]], sides[match["second"]]
    return Side(start, end, "list", (), order=first) if second == r.INVERSE[first] else None


def _between(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "between", (), forward=True)


def _between_them(match: re.Match[str], start: int, end: int) -> Side:
    return Side(start, end, "between", (), ground=int(match["ground"]))


def _fixed(side: str, kind: str) -> Maker:
    def make(match: re.Match[str], start: int, end: int) -> Side:
        return Side(start, end, kind, (side,))

    return make


def _listed(table: dict[str, str]) -> Maker:
    def make(match: re.Match[str], start: int, end: int) -> Side:
        phrase = match["phrase"]
        touching = phrase.split()[0] in r.TOUCHING
        return Side(start, end, "relation", (table[phrase],), forward=True, touching=touching)

    return make


def _any_of(phrases: tuple[str, ...] | list[str]) -> str:
    return "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern[str], Maker]]:
    """Return the patterns, the most special first."""
    table = r.forward_phrases()
    vertical = rf"(?P<vertical>{'|'.join(_VERTICAL)})"
    bare = r"(?! <)(?! the\b)(?! which\b)"
    rows: list[tuple[str, Maker]] = [
        (r"\b(?:from )?(?P<first>left|right|top|bottom) to (?P<second>left|right|top|bottom)\b", _order),
        (r"\bin <(?P<ground>\d+)> 's (?P<side>left|right) (?:hand|arm|paw|palm)s?\b", _hand),
        (rf"\b(?:over|on|across|in) <(?P<ground>\d+)> 's (?:left|right) {_BODY}s?\b", _nothing),
        (r"\bat <(?P<ground>\d+)> 's (?:feet|foot|base|toes|paws|hooves)\b", _feet),
        (rf"\b{vertical} and (?:\w+ ){{0,4}}?{_LATERAL} of {_THING}", _forward),
        (rf"\b{vertical} and (?:\w+ ){{0,3}}?<(?P<ground>\d+)> 's {_LATERAL}", _own),
        (rf"(?:\b(?:to|on|at|in|by) )?<(?P<ground>\d+)> 's {_OWN}{_LATERAL}\b(?! {_BODY})", _own),
        (rf"\b{_CORNER}{_LATERAL} of {_THING}", _forward),
        (rf"{_LATERAL} of {_THING}", _forward),
        (rf"{_LATERAL}(?: \w+){{0,2}}? than {_THING}", _forward),
        (rf"\b(?:on|from|at|to) (?:the )?{_LATERAL} by {_THING}", _inverse),
        (rf"\bfrom {vertical} by {_THING}", _inverse),
        (r"\bfrom (?:the )?(?P<side>left|right)\b", _from),
        (r"\bfrom (?P<vertical>above|below|beneath)\b(?! <)", _from),
        (r"\bbetween (?=<\d+> (?:[^.;]+ )?and )", _between),
        (r"\b(?:in )?between <(?P<ground>\d+)> ", _between_them),
        (rf"\b(?<!the )(?P<phrase>{_any_of(list(table))}) {_THING}", _listed(table)),
        (rf"{_AT}{_CORNER}{_LATERAL}{_IMAGE}(?! of <)", _place),
        (rf"{_AT}{_LATERAL}{_IMAGE}\b(?! (?:of|hand|shoulder|arm))", _place),
        (rf"(?:^|(?<=[.,;:] )){_LATERAL}(?= :)", _place),
        (r"(?<=> )(?P<side>left|right)(?= [.,;)])", _place),
        (r"(?:^|(?<=[.,;:] ))top(?= :)", _fixed(r.ABOVE, "place")),
        (r"(?:^|(?<=[.,;:] ))bottom(?= :)", _fixed(r.BELOW, "place")),
        (rf"\b(?:{_any_of(r.TOP)}){_IMAGE}\b(?! of)", _fixed(r.ABOVE, "place")),
        (rf"\b(?:{_any_of(r.BOTTOM)}){_IMAGE}\b(?! of)", _fixed(r.BELOW, "place")),
        (rf"\b(?:{_any_of(r.MIDDLE)}){_IMAGE}\b(?! of <)", _fixed("middle", "place")),
        (r"\b(?:on|upon|onto)(?= (?:[.,;:)]|is |are |was |were ))", _fixed(r.ABOVE, "stranded")),
        (r"\bon the other(?: side)?\b", _fixed("other", "place")),
        (rf"\b(?:above|overhead){bare}", _fixed(r.ABOVE, "place")),
        (rf"\b(?:below|beneath|underneath|under){bare}", _fixed(r.BELOW, "place")),
    ]  # fmt: skip
    return [(re.compile(pattern), make) for pattern, make in rows]
