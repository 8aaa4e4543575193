"""The predictor: words as pieces, densities, and layouts that keep their promises whatever the weights are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from localctl.layout import Layout
from localctl.layout_predictor import LayoutPredictor, load_predictor, parse
from localctl.layout_predictor.encoding import PIECES, encode, pieces_of
from localctl.layout_predictor.model import PlaceDensity
from localctl.layout_predictor.placing import Placement, density_at, place
from research.layout_predictor.captions import made_up_word
from research.layout_predictor.measure import is_inside, largest_overlap

TINY = {"width": 16, "layers": 2, "heads": 2, "hidden": 16, "buckets": 64, "components": 3}
PROMPTS = (
    "a red circle", "a cat and a cat", "three dogs above two cats", "a cat, a dog, a bird, a fish and a horse",
    "The silver bed was situated to the right of the white couch.",
)  # fmt: skip


@pytest.fixture
def tiny() -> LayoutPredictor:
    torch.manual_seed(0)
    model = LayoutPredictor(**TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_words_have_pieces_known_or_not() -> None:
    assert pieces_of("star", 4096) == pieces_of("star", 4096)
    assert pieces_of("star", 4096) != pieces_of("stars", 4096)
    assert set(pieces_of("stars", 4096)) & set(pieces_of("star", 4096)), "like words share pieces"
    for word in ("a", "supercalifragilisticexpialidocious", "猫", made_up_word(0, "x")):
        assert 1 <= len(pieces_of(word, 64)) <= PIECES and all(1 <= piece < 64 for piece in pieces_of(word, 64))
    assert len({made_up_word(0, number) for number in range(200)}) > 180


def test_encoding_marks_the_words_of_each_object() -> None:
    text = encode(["a red circle, the star", "a cat"], [[(2, 12), (18, 22)], [(2, 5)]], 64, 20)
    assert text.owner.tolist() == [[-1, 0, 0, -1, -1, 1], [-1, 0, -1, -1, -1, -1]]
    assert text.words.sum(dim=1).tolist() == [6, 2] and text.objects.tolist() == [[True, True], [True, False]]
    assert (text.pieces[1, 2:] == 0).all()
    outside, everywhere = text.owner < 0, torch.ones(2, 30, dtype=torch.bool)
    hidden = text.without(everywhere, torch.tensor([False, True])).pieces
    assert (hidden[outside] == 0).all() and torch.equal(hidden[0][~outside[0]], text.pieces[0][~outside[0]])
    assert (hidden[1] == 0).all() and (text.pieces[1, :2] > 0).any()
    with pytest.raises(ValueError, match="more than 3"):
        encode(["a b c d"], [[(0, 1)]], 64, 3)


def test_densities_are_densities(tiny: LayoutPredictor) -> None:
    """They integrate to one, by a fine grid over more than the picture."""
    text = tiny.encode(["a cat above a dog"], [[(2, 5), (14, 17)]])
    with torch.no_grad():
        density = tiny(text, torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool)).of(0, 1)
    ticks = torch.linspace(-9, 10, 500)
    grid = torch.cartesian_prod(ticks, ticks)
    area = float(ticks[1] - ticks[0]) ** 2
    assert abs(float(density.centre_log_prob(grid[:, None])[:, 0].exp().sum()) * area - 1) < 2e-2
    near = torch.rand(50, 2)
    offset = density.centre_log_prob(near[:, None])[:, 0] - density_at(density, near)
    assert torch.allclose(offset, torch.full((50,), -math.log(2 * math.pi)), atol=1e-4)


def test_known_boxes_and_words_matter_and_padding_does_not(tiny: LayoutPredictor) -> None:
    prompts = ["a cat above a dog", "a cat above a dog by the lake in the wood"]
    spans = [[(2, 5), (14, 17)]] * 2
    boxes, known = torch.rand(2, 2, 4), torch.tensor([[True, False]] * 2)
    both = tiny(tiny.encode(prompts, spans), boxes, known)
    alone = tiny(tiny.encode(prompts[:1], spans[:1]), boxes[:1], known[:1])
    assert torch.allclose(both.means[0], alone.means[0], atol=1e-6), "padding"
    assert not torch.allclose(both.means[1], alone.means[0], atol=1e-4), "words"
    other = boxes.clone()
    other[:, 1] = 0.9  # not known, so not read
    assert torch.equal(tiny(tiny.encode(prompts, spans), other, known).means, both.means)
    other[:, 0] = 0.9
    assert not torch.allclose(tiny(tiny.encode(prompts, spans), other, known).means, both.means, atol=1e-4)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_boxes_lie_inside_and_apart(tiny: LayoutPredictor, prompt: str, seed: int | None) -> None:
    layout = tiny.predict(prompt, seed, height=64, width=128, chunker="rules")
    objects = parse(prompt, "rules")
    assert isinstance(layout, Layout) and layout.prompt == prompt and layout.size == (64, 128)
    assert [region.phrase for region in layout.regions] == [item.phrase for item in objects]
    assert [region.prompt for region in layout.regions] == [item.description for item in objects]
    assert [layout.characters(region) for region in layout.regions] == [item.span for item in objects]
    assert [len(region.boxes) for region in layout.regions] == [item.count for item in objects]
    placed = [box for own in tiny.place_objects(prompt, objects, seed) for box in own]
    assert all(map(is_inside, placed)) and largest_overlap(placed) < 1e-3
    assert layout == tiny.predict(prompt, seed, height=64, width=128, chunker="rules")


def test_seeds_draw_and_no_seed_is_the_most_likely(tiny: LayoutPredictor) -> None:
    several = {tiny.predict("a cat and a dog", seed).regions for seed in range(4)}
    assert len(several) == 4
    density = PlaceDensity(
        torch.tensor([0.2, 0.8]).log(), torch.tensor([[0.2, 0.2], [0.7, 0.6]]), torch.full((2, 2), 0.1),
        torch.tensor([0.3, 0.2]).log(), torch.tensor([0.1, 0.1]),
    )  # fmt: skip
    best, _ = place(density, [], None)
    assert np.allclose(best.numbers, (0.7, 0.6, 0.3, 0.2), atol=0.02)
    beside, after = place(density, [best], None)
    assert largest_overlap([*after, beside]) < 1e-3
    assert abs(beside.x - 0.7) < 0.03 and 0.18 < abs(beside.y - 0.6) < 0.22, "beside it, in the heavier part"
    assert largest_overlap([best, Placement(0.7, 0.6, 0.1, 0.1)]) == pytest.approx(1)
    drawn = [place(density, [], (0, "p", 0, number))[0] for number in range(200)]
    share = np.mean([box.x > 0.45 for box in drawn])
    assert 0.7 < share < 0.9, "drawn as the weights say"


def narrow(x: float, y: float, width: float, height: float) -> PlaceDensity:
    mean, size = torch.tensor([[x, y]]), torch.tensor([width, height]).log()
    return PlaceDensity(torch.zeros(1), mean, torch.full((1, 2), 0.01), size, torch.full((2,), 0.01))


def test_boxes_that_would_overlap_both_give_way_and_keep_their_centres() -> None:
    first = Placement(0.4, 0.5, 0.6, 0.4)
    box, (other,) = place(narrow(0.45, 0.7, 0.6, 0.4), [first], None)
    assert abs(box.x - 0.45) < 0.03 and 0.68 < box.y < 0.8 and (other.x, other.y) == (0.4, 0.5)
    assert box.width == pytest.approx(0.6) and other.width == 0.6, "they are farther apart in y"
    assert (box.height, other.height) == pytest.approx((box.y - 0.5, box.y - 0.5), rel=1e-4)
    assert 0 <= largest_overlap([box, other]) < 1e-6


def test_a_crowd_finds_room() -> None:
    taken: list[Placement] = []
    for _ in range(9):
        box, taken = place(narrow(0.5, 0.5, 0.6, 0.6), taken, None)
        taken.append(box)
    assert all(map(is_inside, taken)) and largest_overlap(taken) < 1e-3
    assert min(min(box.width, box.height) for box in taken) > 1e-3


def test_saving_and_loading(tiny: LayoutPredictor, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "run" / "predictor")
    for source in (tmp_path / "run", tmp_path / "run" / "predictor"):
        again = load_predictor(source)
        assert again.predict(PROMPTS[4], 3) == tiny.predict(PROMPTS[4], 3)
        assert not any(parameter.requires_grad for parameter in again.parameters())
    assert json.loads((tmp_path / "run/predictor/config.json").read_text())["components"] == 3


def test_bad_input(tiny: LayoutPredictor, tmp_path: Path) -> None:
    for prompt, words in (
        ("of the", "no object"),
        ("40 cats", "more than 32"),
        ("very " * 140 + "cat", "more than 128"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny.predict(prompt, chunker="rules")
    with pytest.raises(ValueError, match="multiple of 8"):
        tiny.predict("a cat", height=100, width=100)
    with pytest.raises(ValueError, match="heads"):
        LayoutPredictor(width=10, heads=3)
    with pytest.raises(ValueError, match="no layout predictor"):
        load_predictor(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_predictor(tmp_path)
