"""Layouts keep all relations together, whatever the weights are; sizes are those of the things named."""

from __future__ import annotations

import warnings

import pytest
import torch

from localctl.layout_predictor import LayoutPredictor, load_predictor, parse
from localctl.layout_predictor.arranging import arrange, box_sizes
from localctl.layout_predictor.nouns import known_noun, nouns, singular, typical_size
from localctl.layout_predictor.placing import PlaceDensity
from localctl.layout_predictor.reading import AXES, Reading, Relation, read
from localctl.layout_predictor.relations import NEAR
from localctl.micro.shapes import SHAPES
from research.layout_predictor.measure import is_inside, largest_overlap

CHAIN = "A clock above a piano, the piano above a rug, a lamp to the left of the piano and a plant right of the piano."
LONG = "From left to right: a cat, a dog, a cow, a horse, a car, a house, a tree and a boat, and a kite above the dog."
COUNTS = "Three birds above two horses, and a barn to the left of the horses"


def untrained(seed: int) -> LayoutPredictor:
    torch.manual_seed(seed)
    model = LayoutPredictor(width=16, layers=1, heads=2, hidden=16, buckets=64, components=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("prompt", [CHAIN, LONG, COUNTS])
def test_all_relations_hold_together_for_any_weights(prompt: str, seed: int | None) -> None:
    model, objects = untrained(seed or 0), parse(prompt, "rules")
    placed = model.place_objects(prompt, objects, seed)
    relations = [one for one in read(prompt, objects).relations if one.certain and one.side != NEAR]
    assert len(relations) >= 2
    for one in relations:
        axis, sign = AXES[one.side]
        for a in placed[one.first]:
            for b in placed[one.second]:
                apart = sign * (a.numbers[axis] - b.numbers[axis])
                assert apart >= (a.numbers[2 + axis] + b.numbers[2 + axis]) / 2 - 1e-4, one
    boxes = [box for own in placed for box in own]
    assert all(map(is_inside, boxes)) and largest_overlap(boxes) < 1e-3


def test_a_contradiction_is_said_and_the_first_statement_holds() -> None:
    prompt = "A cat is left of a dog. The dog is left of a bird, and the bird is left of the cat."
    objects = parse(prompt, "rules")
    with pytest.warns(UserWarning, match="'a bird' is left of 'A cat', .* follows what comes first"):
        placed = untrained(0).place_objects(prompt, objects)
    cat, dog, bird = (own[0].x for own in placed)
    assert cat < dog < bird


def test_a_possible_reading_that_does_not_fit_is_left_out_silently() -> None:
    objects = parse("a cat, a dog", "rules")
    reading = Reading((Relation(0, "left", 1), Relation(0, "right", 1, certain=False)), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arrange(objects, reading, torch.full((2, 2), 0.3)).relations == [reading.relations[0]]


def test_long_chains_shrink_until_they_fit() -> None:
    objects = parse(LONG, "rules")
    plan = arrange(objects, read(LONG, objects), torch.full((len(objects), 2), 0.5))
    assert float(plan.sides[:8, 0].sum()) <= 0.98 + 1e-6
    low, high = plan.bounds([], 3)
    assert low[0] < high[0]


def density(count: int) -> PlaceDensity:
    sizes = torch.full((count, 2), 0.25).log()
    return PlaceDensity(torch.zeros(count, 1), torch.zeros(count, 1, 2), torch.ones(count, 1, 2), sizes, sizes)


def test_sizes_are_those_of_the_things() -> None:
    objects = parse("a kitten, two giraffes, a sofa and a blorptang", "rules")
    kitten, giraffe, sofa, other = box_sizes(objects, density(4), None).tolist()
    assert kitten[0] * kitten[1] < giraffe[0] * giraffe[1] and giraffe[1] > 1.3 * giraffe[0] and sofa[0] > 1.3 * sofa[1]
    assert other == pytest.approx([0.25, 0.25]), "what the model predicts"
    assert box_sizes(objects, density(4), {"sofa": [0.6, 0.4]})[2].tolist() == pytest.approx([0.6, 0.4])


def test_the_table_of_nouns() -> None:
    assert len(nouns()) >= 200 and all(0 < side < 1000 for _, *sides in nouns().values() for side in sides)
    assert all(singular(noun) == noun or noun in ("boots", "shoes") for noun in nouns() if noun not in ("stairs",))
    assert [known_noun(phrase) for phrase in ("old Wolves", "cup of coffee", "girl's red hat", "blorptang")] == [
        "wolf", "cup", "hat", None,
    ]  # fmt: skip
    assert typical_size("quokka") is None
    assert not any(typical_size(f"a red {shape}") for shape in SHAPES), "the shapes of the embedded base have no metres"


def test_what_is_on_stands_on_it() -> None:
    predictor = load_predictor()
    (vase,), (table,) = predictor.place_objects(p := "a vase on a table", parse(p, "rules"))
    assert abs((table.y - table.height / 2) - (vase.y + vase.height / 2)) < 0.06 and abs(vase.x - table.x) < 0.2
    assert table.width > vase.width


def test_copies_have_the_size_that_annotations_give_one() -> None:
    objects = parse("two cats above three wine glasses", "rules")
    known = {"cat": [0.3, 0.2], "wine glass": [0.1, 0.25]}
    torch.testing.assert_close(box_sizes(objects, density(2), known), torch.tensor([*known.values()]))


def test_sizes_from_annotations_are_checked() -> None:
    with pytest.raises(ValueError, match=r"widths and heights in \(0, 1\], not \[2, 0.1\]"):
        LayoutPredictor(sizes={"cat": [2, 0.1]})
