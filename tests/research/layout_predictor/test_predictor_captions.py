"""Generated sentences are true of their scene and have correct spans; held-out families stay out of training."""

from __future__ import annotations

import re

import numpy as np
import pytest

from localctl.layout_predictor import parse
from localctl.micro.scenes import PROFILES, SIZE, SPLITS, scene, scene_plan
from localctl.seeding import numpy_rng
from research.layout_predictor import templates
from research.layout_predictor.captions import (
    KINDS,
    PlacedScene,
    describe,
    mirrored,
    own_caption,
    renamed,
    satisfied,
    true_relations,
)
from research.layout_predictor.data import CaptionSettings, MicroLayouts, example, targets

BOXES = np.array([[0.2, 0.3, 0.2, 0.2], [0.7, 0.35, 0.3, 0.2], [0.5, 0.8, 0.2, 0.3]])
SCENE = PlacedScene("s", ("red circle", "blue star", "green ring"), BOXES)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_plan_is_the_scene_without_its_image(profile: str, split: str) -> None:
    for index in (0, 7, 8, 21):
        plan, whole = scene_plan(index, profile, split), scene(index, profile, split)
        assert (plan.caption, plan.background, plan.objects, plan.relation) == (
            whole.caption, whole.background, whole.objects, whole.relation,
        )  # fmt: skip


def test_micro_layouts_are_the_boxes_of_the_scenes() -> None:
    layouts = MicroLayouts("test", 30)
    for index in range(30):
        plan, layout = scene_plan(index, split="test"), layouts[index]
        for item, name, box in zip(plan.objects, layout.names, layout.boxes, strict=True):
            assert name == item.phrase
            x, y, width, height = box * SIZE
            assert np.allclose((x - width / 2, y - height / 2, x + width / 2, y + height / 2), item.box)
        caption = own_caption(layout)
        assert caption.text == plan.caption
        assert [caption.text[slice(*span)] for span in caption.spans] == sorted(layout.names, key=caption.text.index)
        for relation in caption.relations:
            assert satisfied(relation, [(box[0], box[1]) for box in caption.boxes])


def test_crowded_scenes_are_the_fuller_of_two() -> None:
    plain, crowded = MicroLayouts("train", 20), MicroLayouts("train", 10, crowded=True)
    for index in range(10):
        pair = plain[2 * index], plain[2 * index + 1]
        assert len(crowded[index].names) == max(len(item.names) for item in pair)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_sentence_states_is_true_and_parsed_as_meant(kind: str) -> None:
    families = set()
    for number in range(150):
        caption = describe(SCENE, numpy_rng(0, kind, number), kind)
        families.add(caption.family)
        centres = [(box[0], box[1]) for box in caption.boxes]
        assert all(satisfied(relation, centres) for relation in caption.relations), caption.text
        assert "{" not in caption.text
        for span, box in zip(caption.spans, caption.boxes, strict=True):
            named = SCENE.names.index(caption.text[slice(*span)])
            assert np.array_equal(SCENE.boxes[named], box)
        assert tuple(item.span for item in parse(caption.text, "rules")) == caption.spans, caption.text
    wanted = {"training": {*templates.TRAINING, "spots"}, "held_out": set(templates.HELD_OUT), "list": {"list"}}
    assert families == wanted[kind]


def test_each_field_says_the_side_it_is_meant_for() -> None:
    """The words for a side never name another side."""
    sides = {"left": {"left"}, "right": {"right"}}
    sides["above"] = {"above", "over", "top", "atop", "higher", "upper", "up", "high"}
    sides["below"] = {"below", "under", "beneath", "underneath", "bottom", "lower", "down", "low"}
    for table in (templates.PREPOSITIONS, templates.AT, templates.ITS, templates.ON_ITS):
        assert set(table) == set(sides)
        for side, phrases in table.items():
            others = set().union(*(words for other, words in sides.items() if other != side))
            assert all(set(phrase.split()) & sides[side] and not set(phrase.split()) & others for phrase in phrases)


def test_unseen_families_are_unseen() -> None:
    """No training sentence has the words of the held-out templates, nor "has" or "on its left"."""
    trained = [template for family in templates.TRAINING.values() for template in family]
    trained += [*templates.LISTS, *templates.WITH_A_THIRD, *templates.THIRD_RELATED]
    unseen = [template for family in templates.HELD_OUT.values() for template in family]
    assert not set(trained) & set(unseen) and not set(templates.TRAINING) & set(templates.HELD_OUT)
    words = {word for template in trained for word in re.findall(r"[a-z]+", template)}
    phrases = [
        phrase
        for table in (templates.PREPOSITIONS, templates.AT, templates.ITS)
        for p in table.values()
        for phrase in p
    ]
    words |= {word for phrase in (*phrases, *templates.OPENINGS, *templates.ENDINGS) for word in phrase.split()}
    assert not words & {"has", "found", "look", "what", "one", "put", "goes", "stays", "while"}
    assert not any(phrase.startswith("on its") for phrase in phrases)


def test_relations_need_their_margin() -> None:
    assert true_relations(BOXES, 0, 1) == ["left"]
    assert true_relations(BOXES, 1, 0) == ["right"]
    assert true_relations(BOXES, 2, 1, 0.15) == ["left", "below"]
    assert not satisfied((0, "left", 1), [(0.6, 0.1), (0.5, 0.9)]) and satisfied(
        (0, "above", 1), [(0.6, 0.1), (0.5, 0.9)]
    )
    near = PlacedScene("n", ("a", "b"), np.array([[0.5, 0.5, 0.1, 0.1], [0.55, 0.52, 0.1, 0.1]]))
    assert describe(near, numpy_rng(0), "held_out").relations == ()


def test_mirrored_scenes() -> None:
    assert np.allclose(mirrored(SCENE, True, False, False).boxes[:, 0], 1 - BOXES[:, 0])
    assert np.allclose(mirrored(SCENE, False, True, False).boxes[:, 1], 1 - BOXES[:, 1])
    assert np.allclose(mirrored(SCENE, False, False, True).boxes, BOXES[:, [1, 0, 3, 2]])
    assert np.allclose(mirrored(mirrored(SCENE, True, True, False), True, True, False).boxes, BOXES)


def test_made_up_names_hide_what_things_are() -> None:
    several = [renamed(SCENE, 0, "k", number, rng=numpy_rng(0, number)) for number in range(40)]
    names = {name for item in several for name in item.names}
    assert len(names) > 80 and not names & set(SCENE.names)
    assert all(np.array_equal(item.boxes, BOXES) and item.caption is None for item in several)


def test_examples_depend_on_their_key_alone() -> None:
    scenes, settings = MicroLayouts("train", 5, crowded=True), CaptionSettings()
    first = [example(scenes, index, 3, settings, 0) for index in range(5)]
    again = [example(MicroLayouts("train", 5, crowded=True), index, 3, settings, 0) for index in reversed(range(5))]
    assert [item.text for item in first] == [item.text for item in reversed(again)]
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(first, reversed(again), strict=True))
    assert [item.text for item in first] != [example(scenes, index, 4, settings, 0).text for index in range(5)]
    one = CaptionSettings(variants=1)
    assert example(scenes, 0, 0, one, 0).text == example(scenes, 0, 9, one, 0).text
    boxes = targets(first)
    assert boxes.shape == (5, max(len(item.spans) for item in first), 4)
    assert np.allclose(boxes[0, : len(first[0].spans)].numpy(), first[0].boxes, atol=1e-6)


@pytest.mark.parametrize(
    "values", [{"own": 1.5}, {"lists": -1}, {"rename": 2}, {"margin": 0}, {"margin": 0.5}, {"variants": 0}]
)
def test_settings_that_make_no_sense(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"captions.{next(iter(values))}"):
        CaptionSettings(**values)  # type: ignore[arg-type]
