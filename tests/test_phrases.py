"""Phrases are found in what the text encoder reads: learned words, accents, quotes and spaces included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import draw
from conftest import tiny_tokenizer
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from localctl.bases import MICRO_WEIGHTS
from localctl.control.attach import attach
from localctl.control.dense import DenseModulation
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout, Region
from localctl.phrases import find_phrase
from localctl.tokens import positions_of, token_positions

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def learned(pipe: Any, word: str = "<cat-toy>", vectors: int = 3) -> Any:
    """``pipe`` with a word learned by textual inversion, in each of its text encoders."""
    width = pipe.text_encoder.config.hidden_size
    weights = torch.randn(vectors, width, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({word: weights}, token=word)
    if getattr(pipe, "text_encoder_2", None) is not None:
        pipe.load_textual_inversion(
            {word: weights}, token=word, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    return pipe


def micro_tokenizer() -> CLIPTokenizer:
    """That of the embedded base; it is CLIP's own with fewer words."""
    return CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer")


@pytest.mark.parametrize("fixture", ["sd_pipe", "sdxl_pipe"])
@pytest.mark.parametrize("prompt", ["<cat-toy> on a mat", "a <cat-toy>, a mat", "a mat by a <cat-toy>"])
def test_words_of_several_vectors(fixture: str, prompt: str, request: pytest.FixtureRequest) -> None:
    pipe = learned(request.getfixturevalue(fixture))
    layout = Layout(prompt, regions=(Region("mat", LEFT), Region("<cat-toy>", RIGHT)))
    mat, toy = positions_of(pipe, layout)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids
    read = pipe.tokenizer.convert_ids_to_tokens(ids)
    assert [read[index] for index in mat] == ["m", "a", "t</w>"]
    assert [read[index] for index in toy] == ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2"]


def test_every_vector_is_steered(sd_pipe: StableDiffusionPipeline) -> None:
    pipe = learned(sd_pipe)
    layout = Layout("a <cat-toy> on a mat", regions=(Region("mat", LEFT), Region("a <cat-toy>", RIGHT)))
    assert [len(tokens) for tokens in positions_of(pipe, layout)] == [3, 4]
    plain = draw(pipe, layout.prompt)
    for control in (RegionBias(hide_phrases=True), DenseModulation(end=1.0), SpaceTimeAttention()):
        with attach(pipe, layout, control):
            assert (draw(pipe, layout.prompt) - plain).abs().max() > 1e-4


def test_learned_words_in_the_sentences_of_refusals(sd_pipe: StableDiffusionPipeline) -> None:
    pipe = learned(sd_pipe)
    part = Layout("a <cat-toy> on a mat", regions=(Region("cat", LEFT),))
    with pytest.raises(
        ValueError, match=r"converts the prompt to 'a <cat-toy> <cat-toy>_1 <cat-toy>_2 on a mat'.*'cat'"
    ):
        positions_of(pipe, part)
    # Written out, the learned word is what pushes the phrase out of what is read.
    long = "<cat-toy> " * 20 + "x" * 20 + " mat"
    layout = Layout(long, regions=(Region("mat", LEFT),))
    assert token_positions(pipe.tokenizer, layout) == [(41, 42, 43)]
    with pytest.raises(ValueError, match=r"'mat' comes after the first 77 tokens.*\(<cat-toy> \| <cat-toy>_1 \| "):
        positions_of(pipe, layout)


def test_other_conversions_are_followed_or_refused() -> None:
    tokenizer = tiny_tokenizer()
    layout = Layout("cat and dog", regions=(Region("dog", LEFT), Region("cat", RIGHT)))
    # One token per letter; 0 is the start.
    assert token_positions(tokenizer, layout, lambda text: text.replace("and", "with")) == [(8, 9, 10), (1, 2, 3)]
    with pytest.raises(
        ValueError, match=r"converts the prompt to 'god dna tac', in which the phrases 'dog', 'cat' cannot"
    ):
        token_positions(tokenizer, layout, lambda text: text[::-1])


@pytest.mark.parametrize("prompt", [f"a {COMPOSED}, a mat", f"a {DECOMPOSED}, a mat", f"a {COMPOSED.upper()}, a mat"])
@pytest.mark.parametrize("phrase", [COMPOSED, DECOMPOSED, DECOMPOSED.upper()])
def test_accents_composed_or_not(prompt: str, phrase: str) -> None:
    tokenizer = micro_tokenizer()
    ((first, last),) = find_phrase(prompt, phrase)
    assert prompt[first:last].lower() in (COMPOSED, DECOMPOSED)
    layout = Layout(prompt, regions=(Region(phrase, LEFT), Region("mat", RIGHT)))
    ids = tokenizer(prompt).input_ids
    cafe, mat = token_positions(tokenizer, layout)
    assert tokenizer.decode([ids[index] for index in cafe]).replace(" ", "") == COMPOSED
    assert tokenizer.decode([ids[index] for index in mat]).replace(" ", "") == "mat"
    with pytest.raises(ValueError, match="is not in the prompt"):
        Layout(prompt, regions=(Region("cafe", LEFT),))  # another word, to the tokenizer as well


@pytest.mark.parametrize(
    ("prompt", "phrase", "found"),
    [
        ("the dog\u2019s bowl", "dog's", "dog\u2019s"),
        ("the dog's bowl", "dog\u2019s bowl", "dog's bowl"),
        ("a \u201cred\u201d cat", '"red" cat', "\u201cred\u201d cat"),
        ('a "red" cat', "\u201ered\u201d cat", '"red" cat'),
        ("the \u2018cat\u2019", "'cat'", "\u2018cat\u2019"),
        ("a red\u00a0cat", "red cat", "red\u00a0cat"),
        ("a red cat", "red\u00a0 cat", "red cat"),
        ("a red\n\tcat", "red cat", "red\n\tcat"),
        ("a red\u3000cat", " red cat ", "red\u3000cat"),
        ("\u1112\u1161\u11ab\u1100\u1173\u11af x", "\ud55c\uae00", "\u1112\u1161\u11ab\u1100\u1173\u11af"),  # Hangul
        ("x \ud55c\uae00", "\u1112\u1161\u11ab\u1100\u1173\u11af", "\ud55c\uae00"),
        ("\u0130stanbul at night", "\u0130stanbul", "\u0130stanbul"),
        ("die STRASSE", "strasse", "STRASSE"),
        ("a \u212b ring", "\u00c5", "\u212b"),  # the sign for Angstrom is the letter
        ("A\u0308pfel, x", "\u00e4pfel", "A\u0308pfel"),
        ("a red\u200b cat", "red cat", "red\u200b cat"),
        ("a red\ufeff cir\u00adcle", "red circle", "red\ufeff cir\u00adcle"),
        ("a \uff43\uff41\uff54 here", "cat", "\uff43\uff41\uff54"),
        ("two \ufb01sh", "fish", "\ufb01sh"),
        ("a red\u2010white ball", "red-white ball", "red\u2010white ball"),
        ("a \u00abred\u00bb cat", '"red" cat', "\u00abred\u00bb cat"),
        ("a 5\u2032 pole", "5' pole", "5\u2032 pole"),
    ],
)
def test_one_form_for_what_looks_alike(prompt: str, phrase: str, found: str) -> None:
    ((first, last),) = find_phrase(prompt, phrase)
    assert prompt[first:last] == found


def test_what_is_another_word_stays_one() -> None:
    assert find_phrase("a cafe\u0301 noir", "cafe") == []  # not the first letters of it
    assert find_phrase("the dogs' bowl", "dog") == []
    assert find_phrase("a \u200b cat", "\u200b") == [] and find_phrase("a red\u2014white ball", "red-white") == []
    assert find_phrase("it's", '"') == [] and find_phrase("a cat", "\u00a0") == []
    assert find_phrase("the cat and the Cat's", "cat") == [(4, 7), (16, 19)]
