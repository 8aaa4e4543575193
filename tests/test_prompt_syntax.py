"""Marks in prompts: weights are read; the syntax of other tools is refused, or read as text with one warning."""

from __future__ import annotations

import re
import warnings

import pytest

from localctl.layout_predictor.parsing import parse
from localctl.prompt_syntax import (
    WeightedText,
    foreign_syntax,
    read_weights,
    refuse_foreign,
    warn_of_syntax,
    without_syntax,
)


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [
        ("(a cat:1.2) and a dog", ["(word:1.3)"]),
        ("(a cat: .5), a dog", ["(word:1.3)"]),
        ("((a cat)) and a dog", ["((word))"]),
        ("(((masterpiece))), a dog", ["((word))"]),
        ("[a cat] and a dog", ["[word]"]),
        ("a [cat:dog:0.5]", ["[word]"]),
        ("a cat, <lora:fluffy:0.8>", ["<lora:name:0.8>"]),
        ("a cat <LyCO:x:1>", ["<lora:name:0.8>"]),
        ("a cat, <hypernet:y:0.5>", ["<lora:name:0.8>"]),
        ("a cat BREAK a dog", ["BREAK"]),
        ("a cat AND a dog", ["AND"]),
        ("a {red|blue} cat", ["{a|b}"]),
        ("a cat in __place__", ["__wildcard__"]),
        ("a fluffy++ cat", ["word++"]),
        ("a (fluffy)1.3 cat", ["word++"]),
        ("a cat, embedding:easynegative", ["embedding:name"]),
        ("(a cat:1.2), <lora:x:0.8>", ["(word:1.3)", "<lora:name:0.8>"]),
        ("a cat:1.3, a dog:0.5", ["(word:1.3)"]),
        ("a cat::2 a dog::1", ["(word:1.3)"]),
        ("a cat ADDCOL a dog", ["BREAK"]),
        ("a cat AND_PERP a dog", ["AND"]),
        ("a cat <segment:face>", ["<lora:name:0.8>"]),
        ("('a cat', 'a dog').and(1, 1)", [".and(1, 1)"]),
        ("a cat --ar 16:9 --v 5", ["--ar 16:9"]),
    ],
)
def test_marks_of_other_tools_are_found(prompt: str, kinds: list[str]) -> None:
    assert foreign_syntax(prompt) == kinds
    with pytest.warns(UserWarning, match="has syntax of other tools .such as") as caught:
        warn_of_syntax([prompt, prompt, "a cat"])
    assert len(caught) == 1 and len(without_syntax(prompt)) == len(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (sitting) on a mat",
        "a photo of a house (Paris, 1920)",
        "a clock at 10:30 and a sign (open 9:00 to 17:00 daily)",
        "a photo of [V] dog",
        "a <cat-toy> on a shelf",
        "a C++ book? no: a cat",
        "A CAT AND A DOG BREAK A VASE",
        "Dogs and cats, a break in the clouds",
        "a cat -- the grey one -- and a dog",
        "a smiling face :) and a heart <3",
        "snake_case on a screen, scale 1:20",
        "Chapter:2, a train at 4:30, page:7.",
        "a screen with http://x.y:80/z and localhost:8080",
        "the sign says gate:12:30, and a cat --no, a dog",
        "the sandbox",
        "",
    ],
)
def test_plain_english_is_not_warned_of(prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_syntax([prompt])
    assert without_syntax(prompt) == prompt
    read = read_weights(prompt)
    assert read == WeightedText.plain(prompt)
    refuse_foreign(prompt, read)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("(a cat:1.2) and a dog", [("a cat", 1.2), (" and a dog", 1)]),
        ("(a cat: .5), a dog", [("a cat", 0.5), (", a dog", 1)]),
        ("((a cat)) and (((a dog)))", [("a cat", 1.21), (" and ", 1), ("a dog", 1.331)]),
        ("((a cat:1.2))", [("a cat", 1.32)]),
        ("((red:1.2) cat:1.5)", [("red", 1.8), (" cat", 1.5)]),
        ("[a cat], [[a dog]]", [("a cat", 1 / 1.1), (", ", 1), ("a dog", 1 / 1.21)]),
        ("a fluffy++ cat", [("a ", 1), ("fluffy", 1.21), (" cat", 1)]),
        ("a (red fluffy)+++, (x)--, (y)0.3", [
            ("a ", 1), ("red fluffy", 1.331), (", ", 1), ("x", 0.81), (", ", 1), ("y", 0.3),
        ]),
        (r"fate \(series\), (a \[b\]:1.5)", [("fate (series), ", 1), ("a [b]", 1.5)]),
        ("(1girl:1.3) (at 10:30) (2020:1.1)", [("1girl", 1.3), (" (at 10:30) ", 1), ("2020", 1.1)]),
        ("(a (red:1.2) cat)", [("(a ", 1), ("red", 1.2), (" cat)", 1)]),
        ("(open", [("(open", 1)]),
        ("(:1.3)a", [("a", 1)]),
    ],
)  # fmt: skip
def test_weights_are_read(prompt: str, parts: list[tuple[str, float]]) -> None:
    read = read_weights(prompt)
    refuse_foreign(prompt, read)
    found = [(read.text[first:last], read.weights[first]) for first, last in read.spans]
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])
    assert all(prompt[place] == letter for place, letter in zip(read.places, read.text, strict=True))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("a cat, <lora:fluffy:0.8>", "has '<lora:fluffy:0.8>', syntax of other tools; load a LoRA by --lora, or read"),
        ("a cat, embedding:easynegative", "load a learned word by --textual_inversion"),
        ("a cat BREAK a dog", "has 'BREAK', syntax of other tools; place parts of the prompt by the regions"),
        ("a cat AND a dog", "place parts of the prompt by the regions"),
        ("a {red|blue} cat", "give one prompt for each choice"),
        ("a cat in __place__", "give one prompt for each choice"),
        ("a [cat:dog:0.5]", "give a region with start and end"),
        ("a [cat|dog]", "give a region with start and end"),
        ("a cat:1.3", "put the weighted words in parentheses"),
        ("a cat::2 a dog::1", "put the weighted words in parentheses"),
        ("a cat:.5 on a mat", "put the weighted words in parentheses"),
        ('("a cat", "a dog").blend(0.7, 0.3)', "place parts of the prompt by the regions"),
        ("a cat --ar 16:9", "give sizes, seeds and the like as arguments of their own"),
        ("(a cat:-1)", "has a weight of -1; give weights from 0 to 10"),
        ("(a cat:99)", "has a weight of 99; give weights from 0 to 10"),
    ],
)
def test_what_has_no_meaning_here_is_refused(prompt: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        refuse_foreign(prompt, read_weights(prompt))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("(a cat:1.2) and a dog", ["cat", "dog"]),
        ("a cat, <lora:fluffy:0.8>", ["cat"]),
        ("a dog, no people", ["dog"]),
        ("a man without a hat or gloves, and a dog", ["man", "dog"]),
        ("a street, no cars, no trees", ["street"]),
        ("not a cat but a dog", ["dog"]),
        ("neither a cat nor a dog, a bird", ["bird"]),
        ("a cat that is not on the mat", ["cat", "mat"]),
        ("a cat BREAK a dog", ["cat", "dog"]),
        ("a cat ADDCOL a dog", ["cat", "dog"]),
        ("a cat AND_PERP a dog", ["cat", "dog"]),
        ("a cat:1.3, a dog::0.5", ["cat", "dog"]),
        ("a cat <segment:face>", ["cat"]),
        ('("a cat", "a dog").blend(0.7, 0.3)', ["cat", "dog"]),
        ("a cat AND a dog", ["cat", "dog"]),
        ("((a red circle)), 1.2, 0.8 and a blue star", ["red circle", "blue star"]),
        ("{red|blue}, a cat and __animal__", ["cat"]),
        ("[a cat], (a dog:0.7)", ["cat", "dog"]),
        ("a cat, embedding:bad, 8.5", ["cat"]),
    ],
)
def test_neither_marks_nor_what_is_denied_are_objects(prompt: str, phrases: list[str]) -> None:
    assert [item.phrase for item in parse(prompt, "rules")] == phrases


def test_prompts_of_many_letters_end_at_once() -> None:
    with pytest.raises(ValueError, match="objects, more than 256; name fewer"):
        parse("a cat, " * 3000, "rules")
    with pytest.raises(ValueError, match="no object") as error:
        parse("of the " * 3000, "rules")
    assert len(str(error.value)) < 300
    assert len(parse("a " + "red " * 5000 + "cat", "rules")) == 1
    assert len(read_weights("(" * 3000 + "a" + ")" * 3000).text) == 1
    read_weights("a" * 30000 + "++" * 1000 + "(a:" * 1000)
    with pytest.raises(ValueError, match="half a letter"):
        parse("a cat \ud800", "rules")
