"""Objects of a prompt by the rules: phrases, descriptions, numbers, and what is no object."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from localctl.layout import Layout, Region
from localctl.layout_predictor import parse
from localctl.layout_predictor.chunker import split_words
from localctl.layout_predictor.parsing import spacy_chunks, spacy_model


def descriptions(prompt: str) -> list[str]:
    return [item.description for item in parse(prompt, "rules")]


CASES: dict[str, list[str]] = {
    # relations, in many words
    "The silver bed was situated to the right of the white couch.": ["The silver bed", "the white couch"],
    "the blue star has a red circle on its left": ["the blue star", "a red circle"],
    "a red circle to the left of a blue star on a white background": ["a red circle", "a blue star"],
    "Red circle left of blue square": ["Red circle", "blue square"],
    "a red square right of a red diamond": ["a red square", "a red diamond"],
    "a red circle on the left and a blue square on the right": ["a red circle", "a blue square"],
    "on the left is a red circle, on the right a blue star": ["a red circle", "a blue star"],
    "a red circle up high, a blue star down low": ["a red circle", "a blue star"],
    "if you look to the left of the blue star, you will find a red circle": ["the blue star", "a red circle"],
    "what is above the green ring is a pink cross": ["the green ring", "a pink cross"],
    "the red circle is the one on the left, the blue star the one on the right": ["the red circle", "the blue star"],
    "the lamp and the desk, the first above the second": ["the lamp", "the desk"],
    "the butterfly is further to the left than the lily": ["the butterfly", "the lily"],
    "a wooden chair has been placed directly under a lamp": ["a wooden chair", "a lamp"],
    "a circle that is above a square": ["a circle", "a square"],
    "there is a kite on the left side of the picture and a boat at the bottom": ["a kite", "a boat"],
    "I see a teddy-bear in the top left corner and a butterfly below it": ["a teddy-bear", "a butterfly"],
    "in the center of the image, a fountain": ["a fountain"],
    # verbs
    "a dog sits next to a cat": ["a dog", "a cat"],
    "a dog barks at a mailman": ["a dog", "a mailman"],
    "A man riding a horse in the park": ["A man", "a horse", "the park"],
    "the boy kicks the ball": ["the boy", "the ball"],
    "a lighthouse standing behind a sailboat": ["a lighthouse", "a sailboat"],
    "a basket filled with laundry": ["a basket", "laundry"],
    "a bear playing the accordion, a saxophone hanging above it": ["a bear", "the accordion", "a saxophone"],
    "people sit on benches": ["people", "benches"],
    "there are dogs near a tree": ["dogs", "a tree"],
    "The cat's on the mat": ["The cat", "the mat"],
    "a painting hangs above a ceiling lamp": ["a painting", "a ceiling lamp"],
    "a red building on a hill": ["a red building", "a hill"],
    "a sled under a shed": ["a sled", "a shed"],
    # plurals, numbers, measures
    "two cats and three dogs": ["two cats", "three dogs"],
    "3 ducks in a pond": ["3 ducks", "a pond"],
    "a photo of two zebras and a giraffe": ["two zebras", "a giraffe"],
    "a pair of shoes below a couple of hats": ["a pair of shoes", "a couple of hats"],
    "a cup of coffee near the roof of the house": ["a cup of coffee", "the roof", "the house"],
    "A glass vase full of roses stands on a table.": ["A glass vase full of roses", "a table"],
    "a red bus, a cactus and a lens": ["a red bus", "a cactus", "a lens"],
    # capitals, names, nouns outside COCO's
    "Quokkas to the left of THE EIFFEL TOWER": ["Quokkas", "THE EIFFEL TOWER"],
    "An Axolotl Below A Trombone": ["An Axolotl", "A Trombone"],
    "a blorptang directly above a snizzle": ["a blorptang", "a snizzle"],
    "a T-shirt beside a café au-lait mug": ["a T-shirt", "a café au-lait mug"],
    # possessives and adjectives
    "the girl's red hat is above the boy's bicycle": ["the girl's red hat", "the boy's bicycle"],
    "the dogs' bowl is below the cat’s bed": ["the dogs' bowl", "the cat’s bed"],
    "his old bicycle behind their garage": ["his old bicycle", "their garage"],
    "a red and white ball under the big, fluffy dog": ["a red and white ball", "the big, fluffy dog"],
    "a brightly colored parrot above an orange": ["a brightly colored parrot", "an orange"],
    "the left shoe above the upper shelf": ["the left shoe", "the upper shelf"],
    # lists and repeats
    "a red circle, a blue star and a green ring": ["a red circle", "a blue star", "a green ring"],
    "dogs and cats": ["dogs", "cats"],
    "an orange and a banana": ["an orange", "a banana"],
    "a cat and a cat": ["a cat", "a cat"],
    "a cat above a dog, and a bird to the left of the cat": ["a cat", "a dog", "a bird"],
    "a picture with a kite over a lake": ["a kite", "a lake"],
    "a": [],
    "the picture on the wall": ["the picture", "the wall"],
}


@pytest.mark.parametrize("prompt", [prompt for prompt, wanted in CASES.items() if wanted])
def test_objects_of_hard_prompts(prompt: str) -> None:
    assert descriptions(prompt) == CASES[prompt]


def test_spans_and_occurrences_point_at_the_phrases() -> None:
    prompt = "A cat above a cat, two red cats and the girl's cat"
    found = parse(prompt, "rules")
    assert [prompt[slice(*item.span)] for item in found] == [item.phrase for item in found]
    assert [item.phrase for item in found] == ["cat", "cat", "red cats", "girl's cat"]
    assert [item.count for item in found] == [1, 1, 2, 1]
    assert [item.head for item in found] == ["cat", "cat", "cats", "cat"]
    regions = [Region(item.phrase, box=(0, 0, 1, 1), occurrence=item.occurrence) for item in found]
    layout = Layout(prompt, regions=tuple(regions))
    assert [layout.characters(region) for region in regions] == [item.span for item in found]


@pytest.mark.parametrize(
    "prompt", [*CASES, "  ", "?!", "’", "'s", "a b" * 30, "ein Hund\nund eine Katze", "日本の猫", "🙂"]
)
def test_any_text_is_parsed_or_refused_in_one_sentence(prompt: str) -> None:
    try:
        found = parse(prompt, "rules")
    except ValueError as error:
        assert "no object" in str(error) and "\n" not in str(error).replace(prompt, "")
        return
    assert found and all(prompt[slice(*item.span)] == item.phrase for item in found)
    spans = [item.span for item in found]
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("word", "meaning"), [("sits", "verb"), ("left", "place"), ("it", "pronoun"), ("a photo of", "")]
)
def test_a_prompt_without_an_object_is_refused(word: str, meaning: str) -> None:
    with pytest.raises(ValueError, match="no object"):
        parse(word, "rules")


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="text"):
        parse(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="auto, spacy, rules"):
        parse("a cat", "nltk")


def test_words_keep_their_characters() -> None:
    prompt = "The dogs' bowl, the cat’s T-shirt."
    found = split_words(prompt)
    assert [word.text for word in found] == ["the", "dogs'", "bowl", ",", "the", "cat's", "t-shirt", "."]
    assert [prompt[word.start : word.end] for word in found] == [
        "The",
        "dogs'",
        "bowl",
        ",",
        "the",
        "cat’s",
        "T-shirt",
        ".",
    ]


class FakeSpacy:
    """As much of a spaCy pipeline as is read: noun chunks with text, root and characters."""

    def __init__(self, *chunks: str) -> None:
        self.chunks = chunks

    def __call__(self, prompt: str) -> Any:
        def chunk(text: str) -> Any:
            start = prompt.index(text)
            root = SimpleNamespace(text=text.rsplit(maxsplit=1)[-1])
            return SimpleNamespace(text=text, start_char=start, end_char=start + len(text), root=root)

        return SimpleNamespace(noun_chunks=[chunk(text) for text in self.chunks])


def test_spacy_chunks_become_objects() -> None:
    prompt = "a photo of it: 2 dogs and the girl's red hat on the left of two trees in the picture"
    model = FakeSpacy("a photo", "it", "2 dogs", "the girl's red hat", "the left", "two trees")
    found = parse(prompt, "spacy", model)
    assert [item.phrase for item in found] == ["dogs", "girl's red hat", "trees"]
    assert [item.description for item in found] == ["2 dogs", "the girl's red hat", "two trees"]
    assert [item.count for item in found] == [2, 1, 2]
    assert [prompt[slice(*item.span)] for item in found] == ["dogs", "girl's red hat", "trees"]


def test_spacy_that_is_missing_is_an_error_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    util = SimpleNamespace(get_installed_models=lambda: ["de_core_news_sm"])
    fake = SimpleNamespace(util=util, __spec__=SimpleNamespace(name="spacy"))
    monkeypatch.setitem(sys.modules, "spacy", fake)  # type: ignore[arg-type]
    assert spacy_model() is None
    assert [item.phrase for item in parse("a cat")] == ["cat"]
    with pytest.raises(ValueError, match="run `python -m spacy download en_core_web_sm`"):
        parse("a cat", "spacy")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)  # then there is no such command
        with pytest.raises(ValueError, match=r'run `pip install "localctl\[spacy\]" && python -m spacy download'):
            parse("a cat", "spacy")
    util.get_installed_models = lambda: ["en_core_web_sm"]
    fake.load = lambda name, disable: FakeSpacy("a cat")
    assert [item.phrase for item in parse("a cat")] == ["cat"]


def test_spacy_itself() -> None:
    """A parse set by hand, as no model may be installed."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc

    words = ["The", "silver", "bed", "was", "situated", "near", "the", "couch"]
    tags = ["DET", "ADJ", "NOUN", "AUX", "VERB", "ADP", "DET", "NOUN"]
    deps = ["det", "amod", "nsubjpass", "auxpass", "ROOT", "prep", "det", "pobj"]
    doc = Doc(spacy.blank("en").vocab, words, pos=tags, deps=deps, heads=[2, 2, 4, 4, 4, 4, 7, 5])
    chunks = spacy_chunks(doc.text, lambda prompt: doc)
    assert [doc.text[chunk.start : chunk.end] for chunk in chunks] == ["The silver bed", "the couch"]
