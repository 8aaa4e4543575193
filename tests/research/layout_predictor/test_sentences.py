"""The sentences written by hand: frozen, read as they are marked, and apart from training and development."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from localctl.files import sha256
from localctl.layout_predictor import load_predictor
from research.layout_predictor import templates
from research.layout_predictor.sentences import FOLDER, Sentence, judge_sentence, read_sentences

TEST, DEVELOPMENT = FOLDER / "test.txt", FOLDER / "development.txt"
FROZEN = "31f7f62dbc3d188f00a38df1c2ff215d2771551703100e9c3b78ea49dcf09826"


def test_the_test_sentences_are_those_that_were_frozen() -> None:
    assert sha256(TEST) == FROZEN
    sentences = read_sentences(TEST)
    families = [item.family for item in sentences]
    assert len(sentences) == 500 and {families.count(name) for name in set(families)} == {50}


def test_they_share_no_sentence_with_development_and_no_template_with_training() -> None:
    texts = {item.text.lower() for item in read_sentences(TEST)}
    assert not texts & {item.text.lower() for item in read_sentences(DEVELOPMENT)}
    sentences = [template for family in templates.TRAINING.values() for template in family]
    named = [re.sub(r"\\\{[AB](_AGAIN)?\\\}", "(the|an?) .+", re.escape(template)) for template in sentences]
    fixed = [re.compile(pattern) for pattern in named if "\\{" not in pattern and len(pattern) > 40]
    assert not [text for text in texts for pattern in fixed if pattern.fullmatch(text)]


def test_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("# a comment\n## hall\n[A lamp] over [a desk] in {the hall}. | 0^1 1v0\n")
    (found,) = read_sentences(path)
    assert found.text == "A lamp over a desk in the hall." and found.family == "hall"
    assert [found.text[slice(*span)] for span in (*found.objects, *found.optional)] == ["A lamp", "a desk", "the hall"]
    assert found.relations == ((0, "above", 1), (1, "below", 0))
    path.write_text("[A lamp] over [a desk].")
    with pytest.raises(ValueError, match="states no relations"):
        read_sentences(path)


def test_the_published_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gpt.txt"
    path.write_text(
        "Objects: red tv, laptop\nRelation: red tv below laptop\n"
        "Sentence: The laptop stood on a chest, with the red television below it.\n\n"
    )
    (found,) = read_sentences(path)
    assert found.relations == ((0, "below", 1),)
    assert [found.text[slice(*span)] for span in found.objects] == ["television", "laptop"]


def test_a_judge_wants_all_copies_and_no_other_objects() -> None:
    model = load_predictor()
    text = "Two cats sit above a dog"
    spans = ((0, 8), (19, 24))
    good = judge_sentence(model, Sentence(text, "x", spans, (), ((0, "above", 1),)))
    assert good.holds and good.as_meant
    bad = judge_sentence(model, Sentence(text, "x", spans, (), ((0, "below", 1),)))
    assert not bad.holds and bad.broken == ((0, "below", 1),)
    assert not judge_sentence(model, Sentence(text, "x", spans[:1], (), ())).as_meant
    assert not judge_sentence(model, Sentence("of the", "x", ((0, 2), (3, 6)), (), ((0, "left", 1),))).holds


@pytest.mark.slow
def test_the_gate() -> None:
    model = load_predictor()
    held = [judge_sentence(model, item).holds for item in read_sentences(TEST)]
    assert sum(held) >= 0.85 * len(held)
