"""Families of sentences that state a relation between two things; some are held out from training.

Each family is a tuple of templates with these fields: {A} and {B} are the two things, A being left / right / above /
below of B; {P} is a preposition ("to the left of"); {AT} and {AT_OTHER} are the places of A and B in the image ("on the
left"); {ITS} is A's place relative to B ("to its left"); {IS}, {PLACED} and {STANDS} are verbs.
"""

from __future__ import annotations

LEFT, RIGHT, ABOVE, BELOW = "left", "right", "above", "below"
OPPOSITE = {LEFT: RIGHT, RIGHT: LEFT, ABOVE: BELOW, BELOW: ABOVE}


def _sideways(*phrases: str) -> dict[str, tuple[str, ...]]:
    """Return the phrases for left and for right, * being the side."""
    return {side: tuple(phrase.replace("*", side) for phrase in phrases) for side in (LEFT, RIGHT)}


PREPOSITIONS = _sideways("to the * of", "on the * of", "* of", "on the * side of", "at the * of") | {
    ABOVE: ("above", "over", "on top of", "higher than", "atop", "up above"),
    BELOW: ("below", "under", "beneath", "underneath", "lower than", "down below"),
}
AT = _sideways("on the *", "at the *", "to the *", "on the * side", "in the * half") | {
    ABOVE: ("at the top", "on top", "on the top", "in the upper half", "up high"),
    BELOW: ("at the bottom", "on the bottom", "in the lower half", "down below", "down low"),
}
ITS = _sideways("to its *", "to the * of it", "* of it", "on the * side of it") | {
    ABOVE: ("above it", "over it", "on top of it", "higher up"),
    BELOW: ("below it", "under it", "beneath it", "underneath it", "lower down"),
}
ON_ITS: dict[str, tuple[str, ...]] = {  # held out: no training sentence has "on its left"
    LEFT: ("on its left", "on its left side"),
    RIGHT: ("on its right", "on its right side"),
    ABOVE: ("above it", "over it"),
    BELOW: ("below it", "underneath it"),
}
IS = ("is", "was")
PLACED = ("located", "placed", "situated", "positioned", "shown", "seen", "drawn", "standing", "sitting", "lying")
STANDS = ("sits", "stands", "lies", "rests", "appears", "hangs")

TRAINING: dict[str, tuple[str, ...]] = {
    "plain": ("{A} {P} {B}", "{A}, {P} {B}", "{A} directly {P} {B}"),
    "is": ("{A} {IS} {P} {B}", "{A} and {B}, the first {P} the second"),
    "placed": ("{A} {IS} {PLACED} {P} {B}", "{A} {PLACED} {P} {B}"),
    "stands": ("{A} {STANDS} {P} {B}",),
    "there": ("there {IS} {A} {P} {B}", "i see {A} {P} {B}", "we see {A} {PLACED} {P} {B}"),
    "relative": ("{A} that {IS} {P} {B}", "{A} which {STANDS} {P} {B}", "{A}, which {IS} {PLACED} {P} {B}"),
    "fronted": ("{P} {B} {IS} {A}", "{P} {B} there {IS} {A}", "{P} {B}, {A}", "{P} {B} {STANDS} {A}",
                "{P} {B} we see {A}"),
    "sides": ("{A} {AT} and {B} {AT_OTHER}", "{A} {AT}, {B} {AT_OTHER}", "{A} {IS} {AT} and {B} {IS} {AT_OTHER}",
              "{A} {AT} of the picture and {B} {AT_OTHER}"),
    "sides_fronted": ("{AT} {A}, {AT_OTHER} {B}", "{AT} {IS} {A} and {AT_OTHER} {IS} {B}",
                      "{AT} there {IS} {A}, and {B} {AT_OTHER}"),
    "its": ("{B}, and {ITS} {A}", "{B} and {A} {ITS}", "{B} with {A} {ITS}", "{B} and, {ITS}, {A}",
            "{B}; {ITS} there {IS} {A}", "there {IS} {B}; {A} {IS} {ITS}", "{B}, {A} {PLACED} {ITS}"),
}  # fmt: skip
HELD_OUT: dict[str, tuple[str, ...]] = {
    "has": ("{B} has {A} {ON_ITS}",),
    "can be found": ("{A} can be found {P} {B}",),
    "if you look": ("if you look {P} {B}, you will find {A}",),
    "what is": ("what is {P} {B} is {A}",),
    "the one": ("{A} is the one {AT}, {B} the one {AT_OTHER}",),
    "has been put": ("{A} has been put somewhere {P} {B}",),
    "neighbour": ("{B} is next to {A}, and {A_AGAIN} is {P} {B_AGAIN}",),
    "while": ("{B} stays {AT_OTHER} while {A} goes {AT}",),
}
LISTS = ("{A} and {B}", "{A}, {B}", "{A} with {B}", "{A} next to {B}", "{A} beside {B}", "{A} near {B}",
         "there is {A} and {B}")  # fmt: skip
WITH_A_THIRD = (", and {C}", ", and also {C}", "; there {IS} {C} as well", " and {C}")
THIRD_RELATED = (", and {C} {P_C} {OTHER_AGAIN}", ", {C} {IS} {P_C} {OTHER_AGAIN}", " and {P_C} {OTHER_AGAIN} {C}")
OPENINGS = ("", "", "", "", "a photo of ", "a picture of ", "an image showing ", "a drawing of ")
ENDINGS = (
    "",
    "",
    "",
    ".",
    " on a white background",
    " on a {BACKGROUND} background",
    " against a {BACKGROUND} background",
)
BACKGROUNDS = ("white", "gray", "black", "brown", "green", "blue", "plain")
SPOTS: dict[tuple[int, int], tuple[str, ...]] = {  # by column and row of a 3 x 3 grid over the image
    (0, 0): ("in the top left corner", "at the upper left"),
    (1, 0): ("at the top", "at the top of the picture"),
    (2, 0): ("in the top right corner", "at the upper right"),
    (0, 1): ("on the left", "on the left side of the picture"),
    (1, 1): ("in the middle", "in the center of the picture"),
    (2, 1): ("on the right", "on the right side of the picture"),
    (0, 2): ("in the bottom left corner", "at the lower left"),
    (1, 2): ("at the bottom", "at the bottom of the picture"),
    (2, 2): ("in the bottom right corner", "at the lower right"),
}
