"""Read the relations that a prompt states between its objects, by rules over its words.

1. Mentions of objects become numbers: their first mention, "the X" again, and pronouns (``mentions``).
2. Phrases that place something become sides: "to the left of", "perched atop", "on its right" (``phrases``).
3. Commas, conjunctions and relative pronouns divide the sentence into segments; within and across them each side is
   given the object it is said of.

A prompt can be read in more than one way: "a cat on a mat under a table". The likelier reading is ``certain``. The
others are kept as well: a layout follows them where they agree with what is certain.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from localctl.layout_predictor import words as w
from localctl.layout_predictor.mentions import Group, Mention, mentions_of
from localctl.layout_predictor.parsing import PromptObject
from localctl.layout_predictor.phrases import Side, find_sides
from localctl.layout_predictor.relations import ABOVE, BELOW, INVERSE, LEFT, NEAR, RIGHT
from localctl.layout_predictor.segments import CONTINUING, RELATIVE, STRONG, SUBORDINATE, Item, Segment, segments_of

AXES = {LEFT: (0, -1), RIGHT: (0, 1), ABOVE: (1, -1), BELOW: (1, 1)}


@dataclass(frozen=True)
class Relation:
    """Object ``first`` is on this ``side`` of object ``second``; ``certain``: not one of several readings."""

    first: int
    side: str
    second: int
    certain: bool = True
    touching: bool = False


@dataclass(frozen=True)
class Reading:
    """What a prompt says of the places of its objects.

    relations: the certain ones first. places: of an object in the image, (-1, 0 or 1) per axis, None where not said.
    """

    relations: tuple[Relation, ...]
    places: dict[int, tuple[int | None, int | None]]


def read(prompt: str, objects: Sequence[PromptObject]) -> Reading:
    """Return what ``prompt`` says of the places of its ``objects``."""
    tokens, mentions = mentions_of(prompt, objects)
    sides = find_sides(tokens)
    backdrops = {index for index, item in enumerate(objects) if item.head in w.BACKDROPS}
    return _Reader(segments_of(tokens, mentions, sides), mentions, backdrops).read()


_Readings = tuple[list[Item], list[Item]]


class _Reader:
    """Gives each side of each segment its figure, "A" of "A above B", and its ground, "B"."""

    def __init__(self, segments: list[Segment], mentions: list[Mention], backdrops: set[int]) -> None:
        self.segments, self.mentions, self.backdrops = segments, mentions, backdrops
        self.certain: list[Relation] = []
        self.possible: list[Relation] = []
        self.places: dict[int, tuple[int | None, int | None]] = {}
        self.subject: Item | None = None  # of the clause so far
        self.inner: Item | None = None  # the subject of a clause with "with" or "which", while "and" continues it
        self.last: Item | None = None  # the last thing mentioned
        self.fronting = False  # whether this sentence says places first: "on the left, a cat, on the right, a dog"
        self.last_place: Side | None = None
        self.order: str | None = None  # "left" for "from left to right"
        self.listed: list[int] = []  # the objects of this sentence
        self.seen: list[int] = []

    def read(self) -> Reading:
        """Read all segments in order."""
        for number, segment in enumerate(self.segments):
            if segment.opener in STRONG - {":", "(", ")"}:
                self._end_list()
                self.fronting = False
            outer = self.subject
            if segment.opener in RELATIVE and self.last is not None:
                self.subject = self.last
            for index in segment.sides:
                self._place(number, index)
            self._note(segment, outer)
        self._end_list()
        return Reading((*self.certain, *self._from_places(), *self.possible), self.places)

    def _note(self, segment: Segment, outer: Item | None) -> None:
        """Note the things of a segment, and the subject that the next one may continue; before, it was ``outer``."""
        things = segment.things()
        for one in (thing.choices[0][0] for thing in things):
            self.listed += [one] if one not in self.listed else []
            self.seen += [one] if one not in self.seen else []
        starts_with_thing = bool(segment.items and segment.items[0].choices)
        says = bool(segment.sides) or segment.opener in STRONG or (segment.opener in CONTINUING and starts_with_thing)
        if segment.opener in RELATIVE or segment.opener == "with":
            self.inner = things[0] if things and segment.opener == "with" else self.subject
            self.subject = outer or (things[0] if things else None)
        else:
            if segment.opener != "and" or starts_with_thing:
                self.inner = None
            if things and says and segment.opener not in SUBORDINATE:
                self.subject = self._subject_of(segment) or things[0]
            elif things and self.subject is None:
                self.subject = things[0]
        self.last = things[-1] if things else self.last

    def _subject_of(self, segment: Segment) -> Item | None:
        """Return the subject that the next segment continues with: of a fronted phrase, what it places."""
        first = segment.sides[0] if segment.sides else len(segment.items)
        before = segment.things(0, first)
        if before:
            return before[0]
        side = segment.items[first].side if segment.sides else None
        if side is None:
            return None
        after = segment.things(first)[1 if side.forward else 0 :]
        return after[0] if after else self.subject

    def _place(self, number: int, index: int) -> None:
        """Read the side at ``index`` of segment ``number``."""
        segment = self.segments[number]
        side = segment.items[index].side
        assert side is not None
        if side.order is not None:
            self.order = side.order
            return
        if side.kind == "between":
            self._between(number, index)
            return
        stranded = self._stranded(number, index) if side.ground is None and not side.forward else None
        if stranded is not None:
            self._relate(*stranded, certain=True, touching=side.kind == "stranded")
            return
        before = segment.things(0, index)
        if side.kind == "from" and len(before) > 1:
            for name in side.sides:
                self._relate(before[0], name, before[-1], True, False)
        if side.kind == "stranded" or (side.kind == "from" and len(before) > 1):
            return
        after = segment.things(index)
        grounds = after[:1] if side.forward else []
        if side.ground is not None:
            grounds = [Item(choices=self.mentions[side.ground].choices)]
        rest = after[1:] if side.forward and side.ground is None else after
        figures, others = self._figures(number, index, rest)
        later = [*rest, *(item for following in self.segments[number + 1 :] for item in following.things())]
        if later and grounds and figures and not self._pairs(figures[0], grounds[0]):
            if side.ground is not None or not before:
                figures = later[:1]  # "the gate is guarded on its left by a sentry"
            elif grounds[0].is_pronoun:
                grounds = later[:1]  # "with a lantern above it, the gate ..."
        if side.kind in ("place", "from"):
            self._set_place(side, figures)
            return
        extra = self._more_grounds(number, index) if side.forward else []
        for name in side.sides:
            for figure, ground, certain in (
                *((f, g, side.certain) for f in figures for g in grounds),
                *((f, g, False) for f in others for g in grounds),
                *((f, g, False) for f in figures for g in extra),
            ):
                self._relate(figure, name, ground, certain, side.touching)

    def _figures(self, number: int, index: int, rest: list[Item]) -> _Readings:
        """Return the things that the side at ``index`` is said of, and others that it may be said of."""
        segment = self.segments[number]
        before = [item for place, item in enumerate(segment.things(0, index)) if not item.is_pronoun or not place]
        if before:
            return self._figures_before(number, index, before)
        side = segment.items[index]
        rest = [item for item in rest if not self._is_within_phrase(segment, item, side)]
        if rest:
            self.fronting = self.fronting or side.side is None or side.side.sides != (NEAR,)
            return rest[:1], []
        following = self.segments[number + 1] if number + 1 < len(self.segments) else Segment("")
        starts = segment.opener in STRONG or self.fronting or (segment.opener in CONTINUING and len(segment.items) == 1)
        if following.opener in (",", ":", "-") and starts:
            head = next((item for item in following.items if item.choices or item.side), Item())
            if head.choices:  # "to the left of the barn, a horse"
                self.fronting = True
                return [head], []
        inner = self.inner if segment.opener in ("and", "but") else None
        found = [item for item in (inner, self.subject, self.last) if item is not None]
        owned = side.side is not None and side.side.ground is not None and len(segment.items) == 1
        if owned or segment.opener in RELATIVE or segment.opener in "(-–—:":  # "a fork, on its left, and"
            found = found[::-1][:1]
        if not found:  # "look to the left of the sign and you will see a dog"
            found = [item for later in self.segments[number + 1 :] for item in later.things()][:1]
        return found[:1], found[1:]

    def _figures_before(self, number: int, index: int, before: list[Item]) -> _Readings:
        """Return the same among the things ``before`` the side in its segment: the nearest, or the subject."""
        segment = self.segments[number]
        side, nearest, first = segment.items[index].side, before[-1], before[0]
        direct = next(i for i in range(index - 1, -1, -1) if segment.items[i] is nearest)
        between = {item.word for item in segment.items[direct + 1 : index]} - w.PREPOSITIONS - w.ADVERBS - {"the"}
        finite = bool(between & (w.BE | (w.VERBS - w.PARTICIPLES)))
        outer = [] if self.subject is None else [self.subject]
        if segment.opener in RELATIVE or (segment.opener == "with" and finite):
            # "the globe that my teacher gave me is", "the moped with the broken mirror is"
            return (outer, [nearest]) if finite or nearest is first else ([nearest], outer)
        if nearest is first:
            return [first, *self._joined(number)], outer if segment.opener == "with" else []
        assert side is not None
        follows_side = any(item.side is not None for item in segment.items[:direct])
        if finite or (between and not follows_side and not side.is_place):
            return [first, *self._joined(number)], [] if finite else [nearest]
        preceding = segment.items[direct - 1]
        moves = preceding.word in w.PREPOSITIONS - {"by"} or (
            preceding.side is not None and preceding.side.kind == "relation"
        )
        if side.ground is not None and moves and self.mentions[side.ground].choices[0] == nearest.choices[0]:
            return [first], []  # "the bird flew away from the elephant to its left"
        if self.backdrops & set(nearest.choices[0]):
            return [first], [nearest]  # "a clock hangs on the wall above the sofa"
        return [nearest], [first]

    @staticmethod
    def _is_within_phrase(segment: Segment, thing: Item, side: Item) -> bool:
        """Return whether a thing belongs to a phrase about another one: the hat of "left of a man in a hat"."""
        index = next(i for i, item in enumerate(segment.items) if item is thing)
        before = segment.items[index - 1] if index else Item()
        return (before.side is not None and before is not side) or before.word in w.PREPOSITIONS

    def _stranded(self, number: int, index: int) -> tuple[Item, str, Item] | None:
        """Return figure, side and ground of "the bridge she sits on" or "the table that a cat hides under"."""
        segment = self.segments[number]
        items = segment.items[:index]
        side = segment.items[index].side
        place = next((i for i in range(index - 1, -1, -1) if items[i].choices), None)
        if side is None or place is None or not 1 <= index - 1 - place <= 2 or side.sides[0] not in (ABOVE, BELOW):
            return None
        if place and items[place - 1].choices:
            return items[place], side.sides[0], items[place - 1]
        relative = segment.opener in ("that", "which") and place == 0 and self.last is not None
        return (items[place], side.sides[0], self.last) if relative and self.last is not None else None

    def _joined(self, number: int) -> list[Item]:
        """Return the things joined to the first one of a segment: A, for that of B in "A and B stand left of C"."""
        found: list[Item] = []
        while number > 0 and self.segments[number].opener in ("and", ",") and self.segments[number - 1].is_one_thing:
            if self.segments[number].opener == "," and not found:
                break  # "a pear, a fig below it" is no list
            number -= 1
            found.append(self.segments[number].items[0])
        return found

    def _more_grounds(self, number: int, index: int) -> list[Item]:
        """Return the things joined to a ground at the end of a segment: C, for "A above B and C"."""
        segment = self.segments[number]
        if segment.things(index)[-1:] != [segment.items[-1]] or len(segment.things(index)) != 1:
            return []
        following = self.segments[number + 1] if number + 1 < len(self.segments) else None
        return [following.items[0]] if following and following.opener == "and" and following.is_one_thing else []

    @staticmethod
    def _pairs(figure: Item, ground: Item) -> list[tuple[Group, Group]]:
        """Return what two mentions may mean together: in "the shelf has a lamp above it", it is not the lamp."""
        return [(a, b) for a in figure.choices for b in ground.choices if not set(a) & set(b)]

    def _relate(self, figure: Item, side: str, ground: Item, certain: bool, touching: bool) -> None:
        """Add the relation between the likeliest meanings of two mentions, and the others as possible."""
        for rank, (a, b) in enumerate(self._pairs(figure, ground)):
            for i, j in itertools.product(a, b):
                sure = certain and rank == 0
                (self.certain if sure else self.possible).append(Relation(i, side, j, sure, touching))

    def _between(self, number: int, index: int) -> None:
        """Put the figure between two grounds, the first of them on the left or, if they are stacked, above."""
        segment = self.segments[number]
        side = segment.items[index].side
        before = segment.things(0, index)
        after = [item for one in self.segments[number:] for item in one.things(index if one is segment else 0)]
        grounds = [] if side is None or side.ground is None else [Item(choices=self.mentions[side.ground].choices)]
        after = grounds + after[: 3 - len(grounds)]
        figure = (before[-1:] or after[1 if grounds else 2 :] or [self.subject or Item()])[0]
        members = [i for item in after[: 1 if grounds else 2] for i in item.choices[0]][:2]
        for group in after[0].choices if grounds else ():
            if len(group) == 2 and not (figure.choices and set(group) & set(figure.choices[0])):
                members = list(group)
                break
        if len(members) < 2 or not figure.choices:
            return
        first, second = members
        stated = {(r.first, r.second): r.side for r in self.certain if r.side != NEAR}
        stated |= {(b, a): INVERSE[side] for (a, b), side in stated.items()}
        name = stated.get((first, second), LEFT)
        for i in set(figure.choices[0]) - {first, second}:
            self.possible += [Relation(first, name, i, False), Relation(i, name, second, False)]

    def _set_place(self, side: Side, figures: list[Item]) -> None:
        """Note the place of the figure in the image."""
        names = side.sides
        if names == ("other",):
            names = tuple(INVERSE[name] for name in self.last_place.sides) if self.last_place else ()
        else:
            self.last_place = side
        for figure in figures[:1]:
            for i in figure.choices[0]:
                place = list(self.places.get(i, (None, None)))
                for axis, value in [(0, 0), (1, 0)] if names == ("middle",) else [AXES[name] for name in names]:
                    place[axis] = value if place[axis] is None else place[axis]
                self.places[i] = place[0], place[1]

    def _from_places(self) -> Iterator[Relation]:
        """Yield the relations between objects at different places of the image, then those to objects without one."""
        for axis, (low, high) in enumerate(((LEFT, RIGHT), (ABOVE, BELOW))):
            values = {i: place[axis] for i, place in self.places.items() if place[axis] is not None}
            for (i, a), (j, b) in itertools.combinations(values.items(), 2):
                if a != b:
                    yield Relation(i, low if a < b else high, j)
            others = [i for i in self.seen if i not in values]
            self.possible += [
                Relation(i, low if a < 0 else high, j, False) for i, a in values.items() for j in others if a
            ]

    def _end_list(self) -> None:
        """Order the things of a sentence that says "from left to right"."""
        if self.order is not None:
            self.certain += [Relation(i, self.order, j) for i, j in itertools.pairwise(self.listed)]
            self.order = None
        self.listed = []
