"""Search for phrases in a prompt, and the words that may precede a noun."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise


def word_set(text: str) -> frozenset[str]:
    """Return the words of ``text``, separated by spaces, as a set."""
    return frozenset(text.split())


# Words that may precede a noun.
SINGULAR = word_set("a an one another each every this that either neither")
_NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS, start=2)}
DETERMINERS = frozenset({"the", *SINGULAR, *NUMBERS}) | word_set(
    "some many several few these those both various multiple all no any my your his her its our their whose"
)
# Variants of quotes and hyphens that keyboards and editors use interchangeably.
_QUOTES = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\uff07`\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2212", "-"),
    }
)


def find_phrase(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Return the [first, last) characters of every occurrence of ``phrase`` in ``prompt`` as whole words.

    Case, spacing, composed or separate accents, kinds of quotes, widths of letters and invisible characters do not
    matter.
    """
    folded, places = _folded(prompt)
    pattern = r"\s+".join(map(re.escape, _folded(phrase)[0].split()))
    found = re.finditer(rf"(?<!\w){pattern}(?!\w)", folded, re.IGNORECASE)
    return [(places[match.start()][0], places[match.end() - 1][1]) for match in found if match.group()]


@lru_cache(maxsize=2)  # a prompt is searched for one phrase after another
def _folded(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Normalise ``text``, and map each resulting character to the [first, last) characters of ``text`` it comes from.

    The result is NFKC (CLIP's tokenizers use NFC), in lower case, with plain quotes and no invisible characters.
    """
    # Characters that begin a new unit: not accents and vowel signs, nor later parts of a decomposed Hangul syllable.
    starts = [
        index
        for index, letter in enumerate(text)
        if not index or not (unicodedata.category(letter).startswith("M") or "\u1160" <= letter <= "\u11ff")
    ]
    parts, places = [], []
    for first, last in pairwise([*starts, len(text)]):
        part = unicodedata.normalize("NFKC", text[first:last].translate(_QUOTES)).lower()
        part = "".join(letter for letter in part if unicodedata.category(letter) != "Cf")  # soft hyphens, joiners
        parts.append(part)
        places += [(first, last)] * len(part)
    return "".join(parts), places
