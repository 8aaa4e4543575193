"""Relations of a prompt as they are read: phrases, pronouns, second mentions, places, and what a side is said of."""

from __future__ import annotations

import pytest

from localctl.layout_predictor import parse
from localctl.layout_predictor.reading import read
from localctl.layout_predictor.relations import INVERSE, NEAR, forward_phrases

SIGNS = {"left": "<", "right": ">", "above": "^", "below": "v"}


def stated(prompt: str) -> set[str]:
    """Return the certain relations of a prompt, such as "cat < dog", without those of nearness."""
    objects = parse(prompt, "rules")
    return {
        f"{objects[one.first].head} {SIGNS[one.side]} {objects[one.second].head}"
        for one in read(prompt, objects).relations
        if one.certain and one.side != NEAR
    }


CASES = {
    # pronouns mean the nearest fitting object, or the subject where that is what is placed
    "A lamp stands on a desk, with a cat to its left.": {"lamp ^ desk", "cat < desk"},
    "The person was walking with a car parked to their left.": {"car < person"},
    "The shelf has a vase above it.": {"vase ^ shelf"},
    "The twins look up because a balloon floats over them.": {"balloon ^ twins"},
    "A bird flew away from the elephant to its left.": {"bird < elephant"},
    "In the middle is a table, to its left a chair, to its right a lamp.": {
        "chair < table", "lamp > table",
    },
    "In the square stands an obelisk, to the right of which is a stall.": {"stall > obelisk"},
    "The gate is guarded on its left by a sentry.": {"sentry < gate"},
    "a dog to the left of a man, and a hat above him": {"dog < man", "hat ^ man"},
    # second mentions are no new objects
    "A corgi waits near a gate; the dog is right of the gate.": {"corgi > gate"},
    "A green kite and a red kite; the red kite flies above the green one.": {"kite ^ kite"},
    "A parrot above a treasure chest, and a cannon to the left of the chest.": {"parrot ^ chest", "cannon < chest"},
    "On the dog's left sits a cat, and the dog is near a well.": {"cat < dog"},
    # what a side is said of
    "The clock above the desk, which is old, is left of the door.": {"clock ^ desk", "clock < door"},
    "A cat is above a dog and to the left of a bird.": {"cat ^ dog", "cat < bird"},
    "A cat and a dog sit below a window.": {"cat v window", "dog v window"},
    "A pug in a hat, left of a poodle in a scarf": {"pug < poodle"},
    "The moped with the broken mirror is parked to the left of the bakery.": {"moped < bakery"},
    "To the left of the barn, a horse; above it, a kite.": {"horse < barn", "kite ^ horse"},
    "A cow (to the left of a tractor) at dusk": {"cow < tractor"},
    "A star above and to the right of a moon": {"star ^ moon", "star > moon"},
    # verbs and passives
    "The castle overlooks a village, which is spanned by a rainbow.": {"castle ^ village", "village v rainbow"},
    "A bat dangles from a rafter.": {"bat v rafter"},
    "A cake topped with a cherry": {"cake v cherry"},
    "A toad looks up at a heron.": {"toad v heron"},
    "The road is bordered on the left by a ditch.": {"road > ditch"},
    "The stage is lit from above by a spotlight.": {"stage v spotlight"},
    # places in the image, and lists
    "On the left, a cat; on the right, a dog.": {"cat < dog"},
    "a deer in the lower left corner and a bat in the upper right corner": {"deer < bat", "deer v bat"},
    "A mop on the left side and a broom on the other side": {"mop < broom"},
    "From top to bottom: a cloud, a kite, a castle.": {"cloud ^ kite", "kite ^ castle"},
    "a crate, a barrel and a sack stacked from bottom to top": {"crate v barrel", "barrel v sack"},
    "A trumpet and a tuba, the second above the first.": {"tuba ^ trumpet"},
    "A cat left, a dog right.": {"cat < dog"},
    "the ring and, lower down, a circle": set(),  # possible: the ring has no place of its own
    "at the top a pink cross, at the bottom a tower": {"cross ^ tower"},
    "the fork is the one up high, the cross the one down low": {"fork ^ cross"},
    "A boat between a car to its right and a bicycle to its left": {"car > boat", "bicycle < boat"},
    "A man stands left of a bed, with a chair above it and below a lamp.": {"man < bed", "chair ^ bed", "chair v lamp"},
    # no relation
    "a cat next to a dog": set(),
    "her left shoe and the upper shelf": set(),
}  # fmt: skip


@pytest.mark.parametrize("prompt", CASES)
def test_relations_of_hard_sentences(prompt: str) -> None:
    assert stated(prompt) == CASES[prompt]


def test_each_phrase_of_the_table_is_read_and_its_inverse_is_another_side() -> None:
    missed = []
    for phrase, side in forward_phrases().items():
        found = []
        for subject in ("a blorptang", "the blorptangs"):  # "dangles from", "dangle from"
            objects = parse(prompt := f"{subject} {phrase} a snizzle", "rules")
            relations = read(prompt, objects).relations
            found.append({one.side for one in relations if (one.first, one.second) == (0, 1)})
        if {side} not in found:
            missed.append(phrase)
    assert not missed
    assert all(INVERSE[INVERSE[side]] == side for side in INVERSE)


def test_other_readings_are_possible_ones() -> None:
    objects = parse(prompt := "a cat on a mat under a table", "rules")
    found = {(one.first, one.side, one.second): one.certain for one in read(prompt, objects).relations}
    assert found == {(0, "above", 1): True, (1, "below", 2): True, (0, "below", 2): False}
    objects = parse(prompt := "a boy with a ball in his right hand", "rules")
    found = {(one.first, one.side, one.second): one.certain for one in read(prompt, objects).relations}
    assert found[1, "left", 0] is False, "the boy faces us"


def test_between_is_between() -> None:
    objects = parse(prompt := "a flute between a drum and a horn", "rules")
    found = [(one.first, one.side, one.second) for one in read(prompt, objects).relations if one.side != NEAR]
    assert found == [(1, "left", 0), (0, "left", 2)]


def test_places_are_kept_for_the_layout() -> None:
    objects = parse(prompt := "a cat in the top left corner, a dog in the middle", "rules")
    assert read(prompt, objects).places == {0: (-1, -1), 1: (0, 0)}
