"""Find where a prompt mentions its objects: their first mention, "the X" again, and pronouns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from localctl.layout_predictor import words as w
from localctl.layout_predictor.chunker import Word, split_words
from localctl.layout_predictor.nouns import kind_of, singular
from localctl.layout_predictor.parsing import PromptObject
from localctl.phrases import word_set

Group = tuple[int, ...]  # objects by number; several for "them"
Choices = tuple[Group, ...]  # what a mention may mean, the likeliest first

_IT, _THEY = word_set("it itself"), word_set("they them themselves these those")
_PERSON = word_set("he him she her himself herself")
_POSSESSIVE = {"its": "it", "their": "them", "his": "him", "her": "her", "theirs": "them", "hers": "her"}
_OWNED = word_set("left right immediate own feet foot base head side back shoulder lap far lower upper top bottom")
_ORDINALS = {"former": 0, "first": 0, "latter": 1, "second": 1}
_INTRODUCE = word_set("with between and , while has have had")
_GROUPS = word_set("people crowd couple family team band class audience police crew trio choir")


@dataclass(frozen=True)
class Mention:
    """A mention of an object: what it may mean, the likeliest first, and whether it is no noun."""

    choices: Choices
    is_pronoun: bool = False


def mentions_of(prompt: str, objects: Sequence[PromptObject]) -> tuple[list[str], list[Mention]]:
    """Return the words of ``prompt`` with each mention as "<number>", and the mentions by number.

    A mention takes in the determiners before it. A possessive is followed by the word "'s".
    """
    spans = sorted((span, i) for i, item in enumerate(objects) for span in (item.span, *item.again))
    words = split_words(prompt)
    known = _Known(objects)
    tokens: list[str] = []
    mentions: list[Mention] = []
    last: tuple[int, int] | None = None

    def add(mention: Mention, possessive: bool = False) -> None:
        tokens.append(f"<{len(mentions)}>")
        mentions.append(mention)
        tokens.extend(["'s"] * possessive)

    for index, word in enumerate(words):
        found = next(((span, i) for span, i in spans if span[0] < word.end and word.start < span[1]), None)
        if found is not None:
            span, i = found
            if span != last:
                if index and words[index - 1].text in _POSSESSIVE and tokens[-1:] == ["'s"]:
                    del tokens[-2:], mentions[-1]  # "its tail" mentions a tail
                while tokens and (tokens[-1].isdigit() or tokens[-1] in w.DETERMINERS):
                    if tokens.pop() == "that":
                        break
                known.add(i)
                add(Mention(((i,),)))
            last = span
            if word.end > span[1] and word.text.endswith("'s"):
                tokens.append("'s")
            continue
        last = None
        choices, possessive = known.meant_by(words, index, _placed(tokens, mentions))
        if choices:
            if word.text == "one":
                tokens.pop()  # "the blue one"
            if tokens[-1:] == ["the"]:
                tokens.pop()
            add(Mention(choices, True), possessive)
        else:
            known.end_of(word.text)
            tokens.append(word.text)
    return tokens, mentions


def _placed(tokens: list[str], mentions: list[Mention]) -> Group:
    """Return the last object if a word such as "with" makes it what is placed: "with a lamp to its left"."""
    last = next((i for i in range(len(tokens) - 1, 0, -1) if tokens[i].startswith("<")), 0)
    introduces = last > 0 and tokens[last - 1] in _INTRODUCE
    return mentions[int(tokens[last][1:-1])].choices[0] if introduces else ()


class _Known:
    """The objects mentioned so far, and what a pronoun may mean."""

    def __init__(self, objects: Sequence[PromptObject]) -> None:
        self.objects = objects
        self.introduced: list[int] = []
        self.recent: list[int] = []  # the last mentioned one at the end
        self.subject: int | None = None  # the first object of this sentence, or of the last one
        self.fresh = True
        self.owner: Choices = ()  # of the last "its" of this sentence: "to its left a chair, to its right a lamp"

    def add(self, number: int) -> None:
        if number not in self.introduced:
            self.introduced.append(number)
        if number in self.recent:
            self.recent.remove(number)
        self.recent.append(number)
        if self.fresh:
            self.subject, self.fresh = number, False

    def end_of(self, word: str) -> None:
        """Note the end of a sentence: the next object is its subject."""
        if word in (".", ";", "!", "?"):
            self.fresh, self.owner = True, ()

    def meant_by(self, words: Sequence[Word], index: int, placed: Group) -> tuple[Choices, bool]:
        """Return what the word at ``index`` may mean if it stands for an object, and whether it is possessive.

        ``placed``: the object that is placed just now, and is therefore not the owner of its place.
        """
        text = words[index].text
        before = words[index - 1].text if index else ""
        after = words[index + 1].text if index + 1 < len(words) else "."
        possessive = text in _POSSESSIVE and (text != "her" or after in _OWNED)
        plain = _POSSESSIVE[text] if possessive else text
        if not self.recent or (text in _POSSESSIVE and not possessive and text != "her"):
            return (), False
        if plain == "both" and after in w.DETERMINERS:
            return (), False
        found: Choices = ()
        if plain in _IT:
            found = self._choices(self._things(), self._any())
        elif plain in _PERSON:
            found = self._choices(self._people(), self._subject_first())
        elif plain in _THEY and not (plain in ("these", "those") and _names(after)):
            found = self._plural()
        if possessive and found:
            found = tuple(sorted(found, key=lambda one: one == placed))
            found = tuple(dict.fromkeys((*(one for one in self.owner if one in found), *found)))
            self.owner = found[:1]
        return (found, possessive) if found else (self._other_word(plain, before, after), False)

    def _other_word(self, text: str, before: str, after: str) -> Choices:
        """Return what a word may mean that is no personal pronoun: "both", "the second", "which", "the blue one"."""
        if text in _ORDINALS and before == "the" and len(self.introduced) > 1 and not _names(after):
            return ((self.introduced[-2:][_ORDINALS[text]],),)
        if text in ("both", "each"):
            return tuple(self._pairs())
        if text in ("which", "whom", "that") and before in w.PREPOSITIONS:
            return self._choices(self._any())
        if text == "one" and (same := [i for i in self.recent if before in self._words(i)]):
            return ((same[-1],),)
        return ()

    def _words(self, number: int) -> list[str]:
        return [word.text for word in split_words(self.objects[number].phrase)]

    def _any(self) -> list[int]:
        return self.recent[::-1]

    def _things(self) -> list[int]:
        """Return what "it" may mean: single things, the nearest first, and the subject second."""
        found = [i for i in self.recent[::-1] if not self._is_plural(i) and self._kind(i) != "person"]
        return sorted(found, key=self._is_backdrop)

    def _people(self) -> list[int]:
        return [i for i in self.recent[::-1] if self._kind(i) == "person"]

    def _subject_first(self) -> list[int]:
        first = [] if self.subject is None else [self.subject]
        return [*first, *self.recent[::-1]]

    def _plural(self) -> Choices:
        """Return what "they" may mean: several things, a person, or all objects of the sentence."""
        fitting = [i for i in self.recent[::-1] if self._is_plural(i) or self._kind(i) == "person"]
        groups = self._pairs()
        return (*((i,) for i in fitting), *groups) or ((self.recent[-1],),)

    def _pairs(self) -> list[Group]:
        """Return the last two objects introduced, and the two before the last: "a fox and a hen, a hawk above them"."""
        salient = [i for i in self.introduced if not self._is_backdrop(i)]
        return [tuple(pair) for pair in (salient[-2:], salient[:-1][-2:]) if len(pair) == 2]

    def _is_backdrop(self, number: int) -> bool:
        return self.objects[number].head in w.BACKDROPS

    @staticmethod
    def _choices(*lists: Iterable[int]) -> Choices:
        return tuple(dict.fromkeys((i,) for several in lists for i in several))

    def _is_plural(self, number: int) -> bool:
        item = self.objects[number]
        return item.count > 1 or item.head in _GROUPS or singular(item.head) != item.head

    def _kind(self, number: int) -> str | None:
        return kind_of(self.objects[number].phrase)


def _names(text: str) -> bool:
    """Return whether a word may be the noun after "the first": no function word, verb or punctuation mark."""
    return text[:1].isalnum() and text not in w.BREAKS | w.VERBS | w.PLACES
