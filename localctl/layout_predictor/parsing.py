"""Find the objects of a prompt: noun phrases, their positions in the text, their descriptions and numbers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from localctl.layout_checks import MAX_REGIONS, check_text
from localctl.layout_predictor.chunker import Chunk, rule_chunks, split_words
from localctl.layout_predictor.nouns import kind_of, names_kind, singular
from localctl.layout_predictor.words import DENIALS, DETERMINERS, NUMBERS, PICTURES, PLACES, PRONOUNS
from localctl.phrases import find_phrase
from localctl.prompt_syntax import without_syntax
from localctl.sizes import shown

DEFINITE = frozenset(("the", "that", "this", "these", "those"))
CHUNKERS = ("auto", "spacy", "rules")


@dataclass(frozen=True)
class PromptObject:
    """One object of a prompt.

    phrase: its words in the prompt, without the article. span: [first, last) characters of the phrase.
    description: the local description, with the article ("the white couch").
    head: last word of the phrase, in lower case. count: number of copies (2 for "two dogs").
    occurrence: which occurrence of the phrase in the prompt this is, counted as in ``Region``.
    again: [first, last) characters of later mentions by a noun: "the couch".
    """

    phrase: str
    span: tuple[int, int]
    description: str
    head: str
    count: int = 1
    occurrence: int = 0
    again: tuple[tuple[int, int], ...] = ()


def parse(prompt: str, chunker: str = "auto", model: Any = None) -> tuple[PromptObject, ...]:
    """Find the objects of ``prompt`` in reading order. "a cat and a cat" are two; "a cat ... the cat" is one; "no
    cat" is none, nor is syntax of other tools (:mod:`localctl.prompt_syntax`).

    Args:
        prompt: the text of one prompt.
        chunker: ``spacy`` uses spaCy's noun chunks; ``rules`` those of :mod:`localctl.layout_predictor.chunker`;
            ``auto`` uses spaCy if it and an English model are installed, else the rules.
        model: a loaded spaCy pipeline to use instead of the installed one.

    Raises:
        ValueError: an unknown chunker; spaCy is required but not installed; a prompt that is no text or has no object.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"A prompt must be a text, not {shown(prompt)}.")
    if chunker not in CHUNKERS:
        raise ValueError(f"Unknown chunker {chunker!r}; choose one of {', '.join(CHUNKERS)}.")
    if chunker != "rules" and model is None:
        model = spacy_model(required=chunker == "spacy")
    check_text("The prompt", prompt)
    plain = without_syntax(prompt)
    chunks = rule_chunks(plain) if chunker == "rules" or model is None else spacy_chunks(plain, model)
    chunks = _without_denials(plain, chunks)
    if not chunks:
        raise ValueError(
            f"There is no object in the prompt {shown(prompt)}; name at least one thing, such as 'a red circle'."
        )
    if len(chunks) > MAX_REGIONS:
        raise ValueError(f"The prompt names {len(chunks)} objects, more than {MAX_REGIONS}; name fewer.")
    return tuple(_object(prompt, chunk, again) for chunk, again in _mentions(prompt, chunks))


def _without_denials(prompt: str, chunks: list[Chunk]) -> list[Chunk]:
    """Remove chunks without letters, and objects that the prompt denies: "no people", "without a hat or gloves"."""
    result: list[Chunk] = []
    denied, last = False, 0
    for chunk in chunks:
        between = [word.text for word in split_words(prompt[last : chunk.start])]
        own = [word.text for word in split_words(prompt[chunk.start : chunk.first])]
        denied = bool(DENIALS & {*between[-1:], *own}) or (denied and between in (["or"], ["nor"], [",", "or"]))
        last = chunk.end
        if not denied and any(character.isalpha() for character in prompt[chunk.first : chunk.end]):
            result.append(chunk)
    return result


_Span = tuple[int, int]


def _mentions(prompt: str, chunks: list[Chunk]) -> list[tuple[Chunk, tuple[_Span, ...]]]:
    """Return the first mention of each object, and the characters of its later ones, as "the X" after an X."""
    found: list[tuple[Chunk, list[_Span]]] = []
    for chunk in chunks:
        again = next((spans for first, spans in reversed(found) if _is_again(prompt, first, chunk)), None)
        if again is None:
            found.append((chunk, []))
        else:
            again.append((chunk.first, chunk.end))
    return [(chunk, tuple(spans)) for chunk, spans in found]


def _is_again(prompt: str, first: Chunk, chunk: Chunk) -> bool:
    """Return whether a later chunk mentions the object of the first again.

    It is definite, and says the same words, or some of them with the noun ("the chest" after "a treasure chest"), or
    names its kind ("the bird" after "an owl", "the board" after "a surfboard").
    """
    if not DEFINITE & set(prompt[chunk.start : chunk.first].lower().split()):
        return False
    old, new = ([singular(word) for word in prompt[item.first : item.end].lower().split()] for item in (first, chunk))
    nouns = {old[-1], *(word for word, follower in pairwise(old) if follower == "of")}
    if new[-1] in nouns:
        return set(new) <= set(old)
    if len(new) == 1 and len(new[0]) > 3 and old[-1].endswith(new[0]):
        return True
    return len(new) == 1 and names_kind(new[0], kind_of(prompt[first.first : first.end]))


def _object(prompt: str, chunk: Chunk, again: tuple[_Span, ...]) -> PromptObject:
    phrase = prompt[chunk.first : chunk.end]
    starts = [first for first, _ in find_phrase(prompt, phrase)]
    assert chunk.first in starts, "the phrase must be found at its own position"
    description = prompt[chunk.start : chunk.end]
    return PromptObject(
        phrase, (chunk.first, chunk.end), description, chunk.head, chunk.count, starts.index(chunk.first), again
    )


def spacy_model(required: bool = False) -> Any:
    """Load the first installed English spaCy pipeline; None if there is none, or ValueError if ``required``."""
    installed = importlib.util.find_spec("spacy") is not None
    if installed:
        import spacy  # slow to import, and optional

        names = sorted(name for name in spacy.util.get_installed_models() if name.startswith("en_"))
        if names:
            return spacy.load(names[0], disable=["ner"])
    if required:
        first = "" if installed else 'pip install "localctl[spacy]" && '
        raise ValueError(
            f"spaCy with an English model is not installed; run `{first}python -m spacy download en_core_web_sm`."
        )
    return None


def spacy_chunks(prompt: str, model: Any) -> list[Chunk]:
    """Return the noun chunks of a spaCy pipeline, without pronouns, places and words for the image."""
    chunks = []
    for found in model(prompt).noun_chunks:
        words = [word for word in split_words(found.text) if word.is_word]
        head = found.root.text.lower()
        first = 0
        while first < len(words) and (words[first].text in DETERMINERS or words[first].text.isdigit()):
            first += 1
        if first == len(words) or head in PLACES or head in PRONOUNS:
            continue
        following = prompt[found.end_char :].split(maxsplit=1)
        if head in PICTURES and following and following[0].lower() in ("of", "with", "showing"):
            continue
        numbers = [NUMBERS.get(word.text, int(word.text) if word.text.isdigit() else 1) for word in words[:first]]
        offset = found.start_char
        chunks.append(
            Chunk(
                offset + words[0].start, offset + words[first].start, offset + words[-1].end, head, max([1, *numbers])
            )
        )
    return chunks
