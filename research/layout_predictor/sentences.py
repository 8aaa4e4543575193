"""Sentences written by hand, with the relations that a layout of them must keep, and how many layouts do.

A line is ``[A lamp] hangs over [a desk] in {the hall}. | 0^1``: objects in brackets, words that may or may not become a
region in braces, then relations between the objects by number (``<`` left of, ``>`` right of, ``^`` above, ``v``
below).
``## name`` begins a family. Files with lines ``Objects:``, ``Relation:`` and ``Sentence:``, as published with arXiv
2304.03869, are read too; their objects are searched for by their last word.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localctl.layout_predictor.model import LayoutPredictor
from localctl.layout_predictor.parsing import PromptObject, parse
from localctl.metrics.bootstrap import bootstrap
from research.layout_predictor.captions import Relation, satisfied
from research.page import table

FOLDER = Path(__file__).parent / "sentences"
_SIDES = {"<": "left", ">": "right", "^": "above", "v": "below"}
_MARK = re.compile(r"[\[{]([^\]}]*)[\]}]")
_PUBLISHED = re.compile(r"Objects: (.+)\nRelation: (.+)\nSentence: (.+)")
_STATED = re.compile(r"(.+?) (left of|right of|above|below) (.+)")
_OTHER_NAMES = {
    "tv": "television",
    "phone": "cellphone",
    "drier": "dryer",
    "ball": "basketball",
    "couch": "sofa",
    "orange": "oranges",
}

Span = tuple[int, int]


@dataclass(frozen=True)
class Sentence:
    """A sentence: spans of its objects, of words that may be objects, and relations between the former by number."""

    text: str
    family: str
    objects: tuple[Span, ...]
    optional: tuple[Span, ...]
    relations: tuple[Relation, ...]


def read_sentences(path: Path) -> list[Sentence]:
    """Read a file of sentences. ValueError for a line of another form."""
    text = path.read_text(encoding="utf-8")
    if _PUBLISHED.search(text):
        return [_published(*match.groups()) for match in _PUBLISHED.finditer(text)]
    family, found = "all", []
    for line in text.splitlines():
        if line.startswith("## "):
            family = line[3:].strip()
        elif line.strip() and not line.startswith("#"):
            found.append(_marked(line, family))
    return found


def _marked(line: str, family: str) -> Sentence:
    """Return the sentence of a line with marks."""
    marked, bar, relations = line.rpartition(" | ")
    if not bar:
        raise ValueError(f"The sentence {line!r} states no relations; write them after ' | ', such as 0<1.")
    spans: dict[str, list[Span]] = {"[": [], "{": []}
    for number, match in enumerate(_MARK.finditer(marked)):
        start = match.start() - 2 * number
        spans[match[0][0]].append((start, start + len(match[1])))
    read = tuple((int(one[0]), _SIDES[one[1]], int(one[2])) for one in relations.split())
    return Sentence(_MARK.sub(r"\1", marked), family, tuple(spans["["]), tuple(spans["{"]), read)


def _published(names: str, relations: str, text: str) -> Sentence:
    """Return a sentence of the published form; an object that is not found has the span (-1, -1)."""
    objects = [name.strip() for name in names.split(",")]
    stated = [match.groups() for one in relations.split(",") if (match := _STATED.fullmatch(one.strip()))]
    read = tuple((objects.index(a), side.removesuffix(" of"), objects.index(b)) for a, side, b in stated)
    return Sentence(text, "all", tuple(_search(text, name) for name in objects), (), read)


def _search(text: str, name: str) -> Span:
    """Return where the object ``name`` stands in ``text``: its words, or its last word or another name of it."""
    last = name.rsplit(maxsplit=1)[-1]
    for words in (name, last, _OTHER_NAMES.get(last, last), last.rstrip("s")):
        if match := re.search(rf"\b{re.escape(words)}", text, re.IGNORECASE):
            return match.span()
    return -1, -1


@dataclass(frozen=True)
class Verdict:
    """Whether all relations hold, between all copies of the objects, and whether the objects are those meant."""

    holds: bool
    as_meant: bool
    broken: tuple[Relation, ...] = ()


def judge_sentence(model: LayoutPredictor, sentence: Sentence, seed: int | None = None) -> Verdict:
    """Predict a layout from the words alone, and judge it. Relations of objects that are not found do not hold."""
    try:
        objects = parse(sentence.text, "rules")
    except ValueError:  # no object is found
        return Verdict(False, False, sentence.relations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a contradiction found in a sentence without one shows in the verdict
        placed = model.place_objects(sentence.text, objects, seed)
    found = [_regions_at(span, objects) for span in sentence.objects]

    def holds(relation: Relation) -> bool:
        pair = [found[index][:1] for index in (relation[0], relation[2])]
        if not all(pair):
            return False
        first, second = ([(box.x, box.y) for box in placed[own[0]]] for own in pair)
        return all(satisfied((0, relation[1], 1), (a, b)) for a in first for b in second)

    broken = tuple(relation for relation in sentence.relations if not holds(relation))
    known = [index for span in (*sentence.objects, *sentence.optional) for index in _regions_at(span, objects)]
    as_meant = all(len(own) == 1 for own in found) and set(known) == set(range(len(objects)))
    return Verdict(not broken, as_meant, broken)


def _regions_at(span: Span, objects: Sequence[PromptObject]) -> list[int]:
    return [i for i, item in enumerate(objects) if item.span[0] < span[1] and span[0] < item.span[1]]


def sentence_table(model: LayoutPredictor, sentences: Sequence[Sentence]) -> str:
    """Return a Markdown table with a row per family: the shares of sentences, with 95 % intervals over sentences."""
    judged = [judge_sentence(model, item) for item in sentences]
    families = list(dict.fromkeys(item.family for item in sentences))
    rows = []
    for name in [*families, "all"] if families != ["all"] else families:
        chosen = [v for v, item in zip(judged, sentences, strict=True) if name in (item.family, "all")]
        cells = [bootstrap(np.array([getattr(v, key) for v in chosen])) for key in ("holds", "as_meant")]
        rows.append((f"{name} ({len(chosen)})", [str(cell) for cell in cells]))
    return "\n".join(table(("all relations hold", "objects as meant"), rows, "sentences"))
