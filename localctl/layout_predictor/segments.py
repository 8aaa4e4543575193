"""Divide the words of a prompt at commas, conjunctions and relative pronouns."""

from __future__ import annotations

from dataclasses import dataclass, field

from localctl.layout_predictor.mentions import Choices, Mention
from localctl.layout_predictor.phrases import Side
from localctl.phrases import word_set

STRONG = frozenset(".;:!?()-–—")
RELATIVE = frozenset(("which", "who", "that"))
SUBORDINATE = word_set("because when whenever where although though if as since after before")
CONTINUING = word_set("and but or while whereas so then")
_OPENERS = STRONG | RELATIVE | SUBORDINATE | CONTINUING | {",", "with"}


@dataclass
class Item:
    """A word, a mention (``choices``), or a phrase that places something (``side``)."""

    word: str = ""
    choices: Choices = ()
    is_pronoun: bool = False
    side: Side | None = None


@dataclass
class Segment:
    """A part of a sentence, with the word or mark that opens it."""

    opener: str
    items: list[Item] = field(default_factory=list)

    def things(self, first: int = 0, last: int | None = None) -> list[Item]:
        """Return the mentions among the items [first, last)."""
        return [item for item in self.items[first:last] if item.choices]

    @property
    def sides(self) -> list[int]:
        """The positions of the phrases that place something."""
        return [index for index, item in enumerate(self.items) if item.side is not None]

    @property
    def is_one_thing(self) -> bool:
        """Whether there is a mention and nothing else."""
        return len(self.items) == 1 and bool(self.items[0].choices)


def segments_of(tokens: list[str], mentions: list[Mention], sides: list[Side]) -> list[Segment]:
    """Divide the tokens at commas, conjunctions and relative pronouns; tokens of sides are left out, but mentions."""
    segments = [Segment(".")]
    by_start = {side.start: side for side in sides}
    inside = {index for side in sides for index in range(side.start, side.end)}
    owners = {index for side in sides for index in side.owned}
    for index, token in enumerate(tokens):
        if index in by_start:
            segments[-1].items.append(Item(side=by_start[index]))
        if token.startswith("<"):
            if index not in owners:
                found = mentions[int(token[1:-1])]
                segments[-1].items.append(Item(choices=found.choices, is_pronoun=found.is_pronoun))
        elif index in inside:
            continue
        elif token in _OPENERS:
            if segments[-1].items:
                segments.append(Segment(token))
            elif token != "," and (segments[-1].opener not in STRONG or token not in CONTINUING):
                segments[-1].opener = token  # ", and", "and with", ". When"
        else:
            segments[-1].items.append(Item(word=token))
    return segments
