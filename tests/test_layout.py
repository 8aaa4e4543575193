from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer

from localctl.cells import CELL_MODES, OVERLAPS
from localctl.layout import Layout, Region
from localctl.phrases import find_phrase
from localctl.tokens import token_positions

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def disc() -> torch.Tensor:
    rows = torch.arange(40)[:, None] - 20.0
    return ((rows**2 + (torch.arange(64) - 30.0) ** 2) < 100).float()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs either a box or a mask"),
        ({"box": LEFT, "mask": disc()}, "needs either a box or a mask"),
        ({"box": (0, 0, 1.2, 1)}, r"is not within \[0, 1\]"),
        ({"box": (0, 0, float("nan"), 1)}, r"is not within \[0, 1\]"),
        ({"box": (0.5, 0, 0.2, 1)}, "reversed or empty"),
        ({"box": (0.5, 0.3, 0.7, 0.3)}, "reversed or empty"),
        ({"box": (0, 0, 1)}, "four numbers"),
        ({"box": []}, "four numbers"),
        ({"box": "left"}, "four numbers"),
        ({"box": [LEFT, (0.5, 0, 0.2, 1)]}, "reversed or empty"),
        ({"mask": torch.zeros(8, 8)}, "'cat' is empty"),
        ({"mask": torch.full((8, 8), 2.0)}, r"outside \[0, 1\]"),
        ({"mask": torch.full((8, 8), float("nan"))}, r"outside \[0, 1\]"),
        ({"mask": torch.ones(3, 8, 8)}, r"the shape \(H, W\) or \(1, H, W\), not \(3, 8, 8\)"),
        ({"mask": "disc.png"}, "'cat' is a str; give a PIL image"),
        ({"box": LEFT, "occurrence": -1}, "must be a whole number from 0, not -1"),
        ({"box": LEFT, "strength": float("inf")}, "strength of the region 'cat' must be a finite number"),
        ({"box": LEFT, "start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"box": LEFT, "end": 2}, "0 <= start < end <= 1"),
        ({"box": LEFT, "phrase": 3}, "phrase of a region must be a text, not 3"),
    ],
)
def test_bad_regions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Region(**{"phrase": "cat", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": [Region("dog", LEFT)]}, r"'dog' is not in the prompt \(a \| cat \| on \| a \| carpet\)"),
        ({"regions": [Region("car", LEFT)]}, "'car' is not in the prompt"),  # whole words
        ({"regions": [Region("a", LEFT, occurrence=2)]}, "occurs 2 times in the prompt .* no occurrence 2"),
        ({"regions": [Region("a cat", LEFT), Region("cat", RIGHT)]}, "'a cat' and 'cat' overlap in the prompt"),
        ({"regions": [Region("cat", LEFT), Region("Cat", RIGHT)]}, "overlap in the prompt"),
        ({"regions": ["cat"]}, "must be Region objects, not str"),
        ({"overlap": "mix"}, "Unknown overlap policy 'mix'"),
        ({"regions": [Region("cat", LEFT), Region("carpet", LEFT)], "overlap": "error"}, "'cat' and 'carpet' overlap"),
        (
            {"regions": [Region("cat", LEFT), Region("carpet", (0, 0, 1, 1))], "overlap": "last"},
            "'cat' is completely hidden",
        ),
        ({"height": 60, "width": 64}, "height 60 is not a positive multiple of 8"),
        ({"prompt": ["a"]}, "one text"),
    ],
)
def test_bad_layouts_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**{"prompt": "a cat on a carpet", **options})


def test_phrases_are_whole_words_in_any_case_and_spacing() -> None:
    assert find_phrase("A red  Cat, the cat-flap and a concatenation", "red cat") == [(2, 10)]
    assert [span[0] for span in find_phrase("A Cat, the cat-flap and a concatenation", "cat")] == [2, 11]
    assert find_phrase("it costs $5 (five)", "$5") == [(9, 11)]


def test_tokens_of_a_phrase_by_character_offsets() -> None:
    layout = Layout(
        "big cat, a  cat and more",
        regions=(Region("cat", LEFT, occurrence=1), Region("Big cat", RIGHT), Region(None, LEFT)),
    )
    # One token per letter here; the start token is 0, the comma 7.
    assert token_positions(tiny_tokenizer(), layout) == [(9, 10, 11), (1, 2, 3, 4, 5, 6), ()]


def test_what_the_text_encoder_cannot_see_is_said() -> None:
    prompt = "x" * 70 + " cat dog"
    token_positions(tiny_tokenizer(), Layout(prompt, regions=(Region("cat", LEFT),)))
    with pytest.raises(ValueError, match=r"'dog' comes after the first 77 tokens, .* the prompt's 78 \(x \| x"):
        token_positions(tiny_tokenizer(), Layout(prompt, regions=(Region("dog", LEFT),)))


def test_words_that_share_a_token_are_named() -> None:
    class Joined:
        """A tokenizer to which the whole prompt is one token."""

        is_fast = True
        model_max_length = 77

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"offset_mapping": [(0, 0), (0, 3), (4, len(text)), (0, 0)]}

    layout = Layout("one cat/dog", regions=(Region("cat", LEFT), Region("dog", RIGHT)))
    with pytest.raises(ValueError, match=r"'cat' and 'dog' share a token of the prompt \(one \| cat/dog\)"):
        token_positions(Joined(), layout)
    several = Layout("one cat/dog", regions=(Region("one", LEFT), Region("cat", LEFT), Region("dog", RIGHT)))
    with pytest.raises(ValueError, match="3 regions with phrases for 2 tokens"):
        token_positions(Joined(), several)
    Joined.is_fast = False
    with pytest.raises(ValueError, match="no character offsets"):
        token_positions(Joined(), layout)


@pytest.mark.parametrize("mode", CELL_MODES)
@pytest.mark.parametrize("size", [(64, 80), (9, 11), (4, 4), (1, 1)])
def test_every_region_keeps_a_cell_on_every_grid(size: tuple[int, int], mode: str) -> None:
    dot = torch.zeros(512, 512)
    dot[300, 17] = 1
    stripe = torch.zeros(512, 512)
    stripe[:, 100:104] = 1
    regions = (Region("a", mask=dot), Region("b", mask=stripe), Region("c", (0.7, 0.7, 0.701, 0.71)), Region("d", LEFT))
    masks = Layout("a b c d", regions=regions).masks(size, mode)
    assert masks.shape == (4, 1, *size)
    assert masks.amax(dim=(1, 2, 3)).tolist() == [1.0] * 4
    assert size[0] < 9 or masks[:3].mean(dim=(1, 2, 3)).max() < 0.3  # never the whole picture


def test_masks_of_boxes_are_those_of_their_pixels() -> None:
    box = (0.125, 0.25, 0.5, 0.875)
    pixels = torch.zeros(64, 64)
    pixels[16:56, 8:32] = 1
    for size in ((64, 64), (16, 8), (8, 8)):
        for mode in CELL_MODES:
            ours = Layout("a", regions=(Region("a", box),)).masks(size, mode)
            theirs = Layout("a", regions=(Region("a", mask=pixels),)).masks(size, mode)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=f"{mode} {size}")
    area = Layout("a", regions=(Region("a", box),)).masks((5, 7))
    torch.testing.assert_close(area.mean(), torch.tensor(0.375 * 0.625), rtol=0, atol=1e-6)


def test_soft_masks_stay_soft() -> None:
    mask = torch.full((8, 8), 0.25)
    mask[2:4, 2:4] = 0.5
    assert Layout("a", regions=(Region("a", mask=mask),)).masks((4, 4)).max() == 0.5


@pytest.mark.parametrize("overlap", OVERLAPS[:-1])
def test_overlap_policies(overlap: str) -> None:
    regions = (Region("big", (0, 0, 0.75, 1)), Region("small", (0.5, 0.25, 1, 0.75)))
    masks = Layout("big small", regions=regions, overlap=overlap).masks((4, 4))[:, 0]
    both = masks[:, 1, 2].tolist()
    assert both == {"share": [1, 1], "first": [1, 0], "last": [0, 1], "smallest": [0, 1]}[overlap]
    assert masks[0, 0, 0] == 1 and masks[1, 1, 3] == 1 and masks[1, 0, 0] == 0


def test_from_segments_joins_the_parts() -> None:
    parts = [Region("cat", LEFT), Region("a black  cat on a cat", RIGHT), Region("cat", RIGHT), Region(None, LEFT)]
    layout = Layout.from_segments(parts, height=64, width=128)
    assert layout.prompt == "cat, a black cat on a cat, cat" and layout.size == (64, 128)
    starts = [layout.characters(region) for region in layout.regions]
    assert starts == [(0, 3), (5, 25), (27, 30), None]
    assert Layout.from_segments(parts[:1], "my cat").prompt == "my cat"
    with pytest.raises(ValueError, match="neither a prompt nor a segment with a phrase"):
        Layout.from_segments([Region(None, LEFT)])


def test_regions_compare_by_value() -> None:
    assert Region("a", mask=disc()) == Region("a", mask=disc()) != Region("a", mask=1 - disc())
    assert Region("a", LEFT) == Region("a", [LEFT]) != Region("a", RIGHT)
    assert hash(Region("a", LEFT)) == hash(Region("a", [LEFT]))
