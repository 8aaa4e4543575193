"""Sentences about placed things, annotated with the words that name each thing and the relations stated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from localctl.micro.scenes import article
from localctl.phrases import find_phrase
from localctl.seeding import key_seed
from research.layout_predictor import templates as t

MARGIN = 0.11  # share of the image's side; centres closer than this along an axis have no relation on it
KINDS = ("training", "held_out", "list")
_FIELD = re.compile(r"\{(\w+)\}")
_MODIFIERS = ("red", "blue", "old", "small", "large", "wooden", "shiny", "green", "striped", "silver", "tall")

Relation = tuple[int, str, int]


@dataclass(frozen=True, eq=False)
class PlacedScene:
    """Things and their boxes.

    names: without article. boxes: (n, 4), centre x, y, width and height in [0, 1]. caption: the scene's own sentence,
    with each name once, or None. relation: the relation that it states.
    """

    key: str
    names: tuple[str, ...]
    boxes: np.ndarray
    caption: str | None = None
    relation: Relation | None = None


@dataclass(frozen=True, eq=False)
class Caption:
    """A sentence and its annotations.

    spans: characters [first, last) of each thing's first mention, in reading order. boxes: (n, 4), of the things in
    the same order. relations: (subject, left | right | above | below, object) stated; subject and object are indices
    into spans. family: the family of sentences it is from.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    boxes: np.ndarray
    relations: tuple[Relation, ...]
    family: str


def true_relations(boxes: np.ndarray, first: int, second: int, margin: float = MARGIN) -> list[str]:
    """Return the relations that hold between two of the boxes (n, 4): centres at least ``margin`` apart on the axis."""
    dx, dy = boxes[first, :2] - boxes[second, :2]
    pairs = ((t.LEFT, -dx), (t.RIGHT, dx), (t.ABOVE, -dy), (t.BELOW, dy))
    return [side for side, distance in pairs if distance >= margin]


def satisfied(relation: Relation, centres: Sequence[tuple[float, float]]) -> bool:
    """Return whether a relation holds between centres (x, y), however close they are."""
    first, side, second = relation
    axis, sign = {t.LEFT: (0, -1), t.RIGHT: (0, 1), t.ABOVE: (1, -1), t.BELOW: (1, 1)}[side]
    return (centres[first][axis] - centres[second][axis]) * sign > 0


def own_caption(scene: PlacedScene) -> Caption:
    """Return the scene's own sentence with its annotations."""
    assert scene.caption is not None
    found = [find_phrase(scene.caption, name)[0] for name in scene.names]
    order = sorted(range(len(found)), key=lambda i: found[i])
    relation = () if scene.relation is None else (scene.relation,)
    moved = tuple((order.index(i), side, order.index(j)) for i, side, j in relation)
    return Caption(scene.caption, tuple(found[i] for i in order), scene.boxes[order], moved, "own")


def describe(scene: PlacedScene, rng: np.random.Generator, kind: str = "training", margin: float = MARGIN) -> Caption:
    """Return a sentence about the scene, sampled with ``rng``.

    kind: ``training`` or ``held_out`` for a sentence of these families, ``list`` for one without a relation. Where no
    two things are far enough apart for a relation, the sentence is a list; for a single thing, it names its place in
    the image.
    """
    assert kind in KINDS
    count = len(scene.names)
    order = [int(i) for i in rng.permutation(count)]
    if count == 1:
        return _spots(scene, order, rng)
    pairs = [(i, side, j) for i in order for j in order if i != j for side in true_relations(scene.boxes, i, j, margin)]
    if kind == "training" and rng.random() < 0.06:
        return _spots(scene, order, rng)
    if kind == "list" or not pairs:
        return _list(scene, order, rng)
    relation = pairs[int(rng.integers(len(pairs)))]
    families = t.TRAINING if kind == "training" else t.HELD_OUT
    family = str(rng.choice(list(families)))
    template = str(rng.choice(families[family]))
    relations = [relation]
    fields = _relation_fields(relation, rng)
    third = [i for i in order if i not in (relation[0], relation[2])]
    if third and kind == "training" and rng.random() < 0.7:
        template, more = _with_a_third(template, scene, relation, third[0], fields, rng, margin)
        relations += more
    return _write(scene, _framed(template, rng, kind), fields, relations, family, rng)


def _relation_fields(relation: Relation, rng: np.random.Generator) -> dict[str, str | int]:
    subject, side, other = relation
    at = int(rng.integers(5))
    return {
        "A": subject, "B": other, "A_AGAIN": subject, "B_AGAIN": other,
        "P": _choice(rng, t.PREPOSITIONS[side]), "AT": t.AT[side][at], "AT_OTHER": t.AT[t.OPPOSITE[side]][at],
        "ITS": _choice(rng, t.ITS[side]), "ON_ITS": _choice(rng, t.ON_ITS[side]),
    }  # fmt: skip


def _with_a_third(
    template: str,
    scene: PlacedScene,
    relation: Relation,
    third: int,
    fields: dict[str, str | int],
    rng: np.random.Generator,
    margin: float,
) -> tuple[str, list[Relation]]:
    """Return the template with a third thing appended, and the relations stated of it."""
    other = relation[int(rng.choice((0, 2)))]
    sides = true_relations(scene.boxes, third, int(other), margin)
    fields["C"] = third
    if not sides or rng.random() < 0.5:
        return template + _choice(rng, t.WITH_A_THIRD), []
    side = _choice(rng, sides)
    fields |= {"OTHER_AGAIN": int(other), "P_C": _choice(rng, t.PREPOSITIONS[side])}
    return template + _choice(rng, t.THIRD_RELATED), [(third, side, int(other))]


def _framed(template: str, rng: np.random.Generator, kind: str) -> str:
    opening = _choice(rng, t.OPENINGS) if kind == "training" and template.startswith("{A}") else ""
    ending = _choice(rng, t.ENDINGS) if not template.endswith(".") else ""
    return opening + template + ending


def _list(scene: PlacedScene, order: list[int], rng: np.random.Generator) -> Caption:
    fields: dict[str, str | int] = {"A": order[0], "B": order[1]}
    template = _choice(rng, t.LISTS)
    for number, index in enumerate(order[2:5]):
        fields[f"C{number}"] = index
        template += _choice(rng, t.WITH_A_THIRD).replace("{C}", f"{{C{number}}}")
    return _write(scene, _framed(template, rng, "list"), fields, [], "list", rng)


def _spots(scene: PlacedScene, order: list[int], rng: np.random.Generator) -> Caption:
    """Write "a red circle in the top left corner and a blue star on the right"."""
    fields: dict[str, str | int] = {}
    parts = []
    for number, index in enumerate(order[:3]):
        column, row = (int(v) for v in np.minimum(scene.boxes[index, :2] * 3, 2))
        fields |= {f"C{number}": index, f"AT{number}": _choice(rng, t.SPOTS[column, row])}
        parts.append(f"{{C{number}}} {{AT{number}}}" if rng.random() < 0.8 else f"{{C{number}}}")
    template = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return _write(scene, _framed(template, rng, "list"), fields, [], "spots", rng)


def _write(
    scene: PlacedScene,
    template: str,
    fields: Mapping[str, str | int],
    relations: Sequence[Relation],
    family: str,
    rng: np.random.Generator,
) -> Caption:
    """Return the sentence of a template; a field with a number as value is the thing of that index."""
    definite = rng.random() < 0.5 and len(set(scene.names)) == len(scene.names)
    spans: dict[int, tuple[int, int]] = {}
    text, read = "", 0
    for match in _FIELD.finditer(template):
        text, read = text + template[read : match.start()], match.end()
        value = fields.get(match[1])
        if value is None:
            text += _choice(
                rng, {"IS": t.IS, "PLACED": t.PLACED, "STANDS": t.STANDS, "BACKGROUND": t.BACKGROUNDS}[match[1]]
            )
        elif isinstance(value, str):
            text += value
        else:
            name = scene.names[value]
            phrase = f"the {name}" if definite or value in spans else article(name)
            text += phrase
            spans.setdefault(value, (len(text) - len(name), len(text)))
    text += template[read:]
    order = sorted(spans, key=lambda index: spans[index])
    moved = tuple((order.index(i), side, order.index(j)) for i, side, j in relations)
    return Caption(text, tuple(spans[i] for i in order), scene.boxes[order], moved, family)


def renamed(scene: PlacedScene, seed: int, *keys: int | str, rng: np.random.Generator) -> PlacedScene:
    """Return the scene with made-up names of one to three words, so that names give no hint; rarely all the same."""
    names = []
    for index in range(len(scene.names)):
        name = made_up_word(seed, *keys, index)
        kind = int(rng.integers(6))
        if kind in (0, 1):
            name = f"{_choice(rng, _MODIFIERS)} {name}"
        elif kind == 2:
            name = f"{_choice(rng, _MODIFIERS)} {made_up_word(seed, *keys, index, 'two')} {name}"
        elif kind == 3:
            name += "s"
        names.append(name)
    if rng.random() < 0.03:
        names = names[:1] * len(names)
    return replace(scene, names=tuple(names), caption=None, relation=None)


def mirrored(scene: PlacedScene, flip_x: bool, flip_y: bool, turn: bool) -> PlacedScene:
    """Return the scene mirrored, or with x and y swapped, and without its own sentence, which may no longer hold."""
    boxes = scene.boxes.copy()
    if flip_x:
        boxes[:, 0] = 1 - boxes[:, 0]
    if flip_y:
        boxes[:, 1] = 1 - boxes[:, 1]
    if turn:
        boxes = boxes[:, [1, 0, 3, 2]]
    return replace(scene, boxes=boxes, caption=None, relation=None)


def _choice(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def made_up_word(seed: int, *keys: int | str) -> str:
    """Return a pronounceable nonsense word of 2 or 3 syllables, determined by its key."""
    number = key_seed(seed, "word", *keys)
    syllables = []
    for _ in range(2 + number % 2):
        number, onset = divmod(number >> 1, 20)
        number, vowel = divmod(number, 5)
        number, coda = divmod(number, 8)
        syllables.append("bcdfghjklmnprstvwzqx"[onset] + "aeiou"[vowel] + ("", "", "", "n", "r", "l", "m", "k")[coda])
    return "".join(syllables)
