"""Find the noun phrases of a prompt by rules, without a grammar model or a list of objects.

1. Words are read in order. Function words (prepositions, conjunctions, pronouns, auxiliaries) and punctuation end a
   phrase, and a determiner starts one; the words between them are a phrase.
2. Verbs are recognised by their neighbours: all words after a form of "be" up to the next function word; the word after
   a pronoun or modal verb; at the end of a phrase, if a preposition or determiner follows, words in -ing and -ed
   (except short words and a list of exceptions), and words in -s after a singular article; and a list of frequent
   irregular verbs.
3. "X of Y" without an article before Y is one phrase ("cup of coffee"); a phrase that ends with an adjective continues
   after "and" or a comma ("a red and white ball"); 's connects the owner and its thing.
4. Phrases for a place in the image ("the left", "a white background") or the image itself ("a photo of") are left out.

Known limits: verbs without an ending that are not on the list ("two cats admire a dog"), and verbs in -s after "the",
become part of the phrase before them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from localctl.layout_predictor import words as w
from localctl.layout_predictor.relations import PLACING_VERBS

_TOKEN = re.compile(r"[^\W_]+(?:[-'’.&][^\W_]+)*['’]?|[^\w\s]")
_PARTICLES = ("up", "down", "from", "into", "off")
_VOWEL = re.compile(r"[aeiouy]")


@dataclass(frozen=True)
class Word:
    """A word or punctuation mark, characters [start, end); ``text``: in lower case with straight apostrophes."""

    text: str
    start: int
    end: int

    @property
    def is_word(self) -> bool:
        """Whether this is no punctuation mark."""
        return self.text[:1].isalnum()

    @property
    def is_break(self) -> bool:
        """Whether this ends a phrase: a punctuation mark or function word."""
        return not self.is_word or self.text in w.BREAKS


@dataclass(frozen=True)
class Chunk:
    """A noun phrase: characters [start, end) with its determiner, [first, end) without it; ``count``: 1 or more."""

    start: int
    first: int
    end: int
    head: str
    count: int = 1


def split_words(prompt: str) -> list[Word]:
    """Split a prompt into words, numbers and punctuation marks."""
    found = []
    for match in _TOKEN.finditer(prompt):
        text, end = match[0].lower().replace("’", "'"), match.end()
        if len(text) > 1 and text.endswith("'") and not text.endswith("s'"):
            text, end = text[:-1], end - 1
        found.append(Word(text, match.start(), end))
    return found


def rule_chunks(prompt: str) -> list[Chunk]:
    """Return the noun phrases of a prompt in reading order, without places and words for the image."""
    words = split_words(prompt)
    chunks: list[Chunk] = []
    position = 0
    while position < len(words):
        word = words[position]
        if word.text in w.COMMENTS and position and words[position - 1].text == ",":
            position = next((i for i in range(position, len(words)) if not words[i].is_word), len(words))
            continue
        if word.is_break:
            position = _after_break(words, position)
            continue
        end = _phrase_end(words, position)
        chunk = _chunk(words, position, end)
        if chunk is not None:
            chunks.append(chunk)
        position = max(end, position + 1)
    return chunks


def _after_break(words: list[Word], position: int) -> int:
    """Return the position after a function word and the verb that belongs to it, if any."""
    text, after = words[position].text, position + 1

    def content(index: int) -> bool:
        return index < len(words) and not words[index].is_break and words[index].text not in w.DETERMINERS

    if text in w.BE:
        existence = text == "there's" or any(
            words[i].text == "there" for i in (position - 1, position + 1) if _in(words, i)
        )
        while content(after) and (not existence or _is_participle(words[after].text)):
            after += 1
    elif text in w.VERBS_AHEAD or (text in w.PRONOUNS and text not in ("there", "here")):
        while after < len(words) and words[after].text in w.ADVERBS:
            after += 1
        if content(after):
            after += 1
    return after


def _in(words: list[Word], index: int) -> bool:
    return 0 <= index < len(words)


def _phrase_end(words: list[Word], start: int) -> int:
    """Return the position after the phrase that starts at ``start``, including verbs at its end."""
    end = start
    while end < len(words):
        word = words[end]
        if end > start and word.text in w.DETERMINERS:
            counts = word.text in w.NUMBERS and words[end - 1].text in w.DETERMINERS | w.PLACES | {"last", "next"}
            if not counts:
                break
        if word.is_break:
            if word.text == "of" and _joins(words, start, end):
                end += 1
                continue
            if word.text in ("and", ",") and _continues(words, start, end):
                end += 1
                continue
            break
        end += 1
    return end


def _joins(words: list[Word], start: int, of: int) -> bool:
    """Return whether "X of Y" is one phrase: Y has no determiner, and X is neither a place nor a word for the image."""
    if of == start or words[of - 1].text in w.PLACES | w.PICTURES or of + 1 >= len(words):
        return False
    follower = words[of + 1]
    if words[of - 1].text in ("couple", "lot", "number") and follower.text in w.DETERMINERS:
        return False
    return not follower.is_break and follower.text not in w.DETERMINERS


def _continues(words: list[Word], start: int, comma: int) -> bool:
    """Return whether a phrase that ends with an adjective continues after "and" or a comma."""
    if comma == start or words[comma - 1].text not in w.ADJECTIVES or comma + 1 >= len(words):
        return False
    if words[comma].text == "," and words[comma + 1].text == "and":
        return False
    follower = words[comma + 1]
    if follower.is_break or follower.text in w.DETERMINERS | w.PLACES:
        return False
    last = comma + 1
    while last + 1 < len(words) and not words[last + 1].is_break:
        last += 1
    return last > comma + 1 or follower.text not in w.ADJECTIVES or words[comma].text == "and"


def _chunk(words: list[Word], start: int, end: int) -> Chunk | None:
    first, count, singular = start, 1, False
    while first < end and words[first].text in w.DETERMINERS:
        singular = singular or words[first].text in w.SINGULAR
        count = w.NUMBERS.get(words[first].text, 2 if words[first].text == "both" else count)
        first += 1
    if first < end and words[first].text.isdigit():
        count, first = max(1, int(words[first].text)), first + 1
    follower = words[end] if end < len(words) else None
    last = _without_verbs(words, first, end, follower, singular)
    while first < last and words[first].text in w.VERBS and last - first > 1 and start == first:
        first = start = first + 1  # a phrase without determiner after a verb such as "sits"
    while last > first and (not words[last - 1].is_word or words[last - 1].text == "and"):
        last -= 1
    if first >= last or (all(words[i].text in w.VERBS for i in range(first, last)) and start == first):
        return None
    head = words[last - 1].text
    if head in w.PLACES and last - first > 1 and words[last - 2].text.endswith(("'s", "s'")):
        last -= 1  # "the dog's left": a place beside the dog
        head = words[last - 1].text
    if _is_no_object(words, start, first, last, end):
        return None
    centre = head in ("center", "centre") and last - first > 1 and words[last - 2].text not in w.ADJECTIVES | w.PLACES
    if head == "couple" or (head in w.PLACES and not centre) or head.isdigit():
        return None
    before = words[start - 1].text if start else ""
    if before == "as" and head == "well":
        return None
    if before in ("of", "in", "on") and words[start].text == "the" and last - first == 1 and head in w.PICTURES:
        return None  # "at the top of the picture"
    if head in w.PICTURES and last - first <= 3 and _introduces_content(words, end):
        return None
    if "couple" in (words[i].text for i in range(first, last)):
        count = 2
    stop = words[last - 1].end
    if head.endswith(("'s", "s'")):  # "the cat's on the mat": no thing follows, so this is the verb
        cut = 2 if head.endswith("'s") else 1
        head, stop = head[:-cut], stop - cut
    return Chunk(words[start].start, words[first].start, stop, head, count)


def _is_no_object(words: list[Word], start: int, first: int, last: int, end: int) -> bool:
    """Return whether a phrase is a time, a part ("the top of"), a style (", oil") or is "the red" of "the red one"."""
    head = words[last - 1].text
    following = words[end].text if end < len(words) else ""
    before = words[start - 1].text if start else ""
    if following in ("one", "ones"):
        return True
    if head in w.PARTS and following == "of":
        return True
    if head in w.BODY | w.PARTS and words[start].text in ("his", "her", "its", "their", "my", "your"):
        return True
    bare = start == first or words[start].text == "that"
    if bare and last - first == 1 and _is_participle(head) and (start or end < len(words)):
        return True  # "a kite that hovered", "a guitar, signed by the band"
    if bare and last - first == 1 and head.endswith("ly") and len(head) > 4 and head not in w.NO_ADVERBS:
        return True
    return head in w.NO_OBJECTS or (
        start == first and before in (",", "on", "and", "but") and head in w.STYLES | w.ADJECTIVES - {"orange"}
    )


def _introduces_content(words: list[Word], end: int) -> bool:
    """Return whether the content of an image follows: "a photo of", "a scene with"."""
    return end < len(words) and words[end].text in ("of", "with", "where", "in", *w.HAVE)


def _without_verbs(words: list[Word], first: int, end: int, follower: Word | None, singular: bool) -> int:
    """Return the position after the last word that is no verb, adverb or direction ("a star left of")."""
    transitive = follower is not None and follower.text in w.DETERMINERS
    verb_place = follower is not None and (
        transitive or not follower.is_word or follower.text in w.PREPOSITIONS | w.ADVERBS | w.CONJUNCTIONS
    )
    last = end
    while last - first > 1 and words[last - 2].text != "of":
        text = words[last - 1].text
        direction = text in w.PLACES and _is_direction(words, first, last, follower)
        verb = text in w.VERBS or (verb_place and _is_participle(text))
        followed = transitive or (follower is not None and follower.text in _PARTICLES)
        plural = words[last - 2].text.endswith("s")  # "vines cover the wall", but "a pink cross the size of"
        verb = verb or (text in PLACING_VERBS and followed and plural)
        verb = verb or (verb_place and _is_third_person(text, singular or transitive))
        adverb = text.endswith("ly") and len(text) > 4 and text not in w.NO_ADVERBS
        stands_tall = text in w.ADJECTIVES and last - first > 2 and words[last - 2].text in w.VERBS
        if not (direction or verb or adverb or stands_tall):
            break
        last -= 1
        transitive = False
    return last


def _is_direction(words: list[Word], first: int, last: int, follower: Word | None) -> bool:
    """Return whether the last word is a direction ("a star left of") and not a place ("the top left")."""
    if all(words[i].text in w.PLACES | w.DETERMINERS for i in range(max(0, last - 2), last)):
        return False
    if words[last - 1].text in ("left", "right") and (follower is None or not follower.is_word):
        return first == 0 or words[first - 1].text not in w.DETERMINERS - w.SINGULAR  # "a cat left, a dog right"
    return follower is not None and follower.text in w.PREPOSITIONS


def _is_participle(text: str) -> bool:
    """Return whether a word is a verb of ``VERBS``, or looks like a participle in -ing or -ed."""
    if text in w.NO_PARTICIPLES or text in w.ADJECTIVES:
        return False
    if text in w.VERBS:
        return True
    stem = text[:-3] if text.endswith("ing") else text[:-2] if text.endswith("ed") and not text.endswith("eed") else ""
    return len(stem) > 1 and bool(_VOWEL.search(stem))


def _is_third_person(text: str, singular: bool) -> bool:
    """Return whether a last word in -s is a verb, as after a singular article: "a dog barks at"."""
    plain = text.endswith(("ss", "us", "is", "as", "os", "'s", "s'")) or text in w.NO_PARTICIPLES
    return singular and text.endswith("s") and len(text) > 3 and not plain
