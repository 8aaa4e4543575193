"""The phrases that place one object relative to another, as data. docs/layout_predictor.md shows this table.

"A *phrase* B" means that A is on that side of B. ``OVER`` and ``UNDER`` hold verbs whose subject is above or below
their object ("the castle overlooks the village"), and their passives state the inverse ("the village is overlooked by
the castle"). "left" and "right" have a grammar of their own (``phrases``).
"""

from __future__ import annotations

from localctl.phrases import word_set

LEFT, RIGHT, ABOVE, BELOW, NEAR = "left", "right", "above", "below", "near"
INVERSE = {LEFT: RIGHT, RIGHT: LEFT, ABOVE: BELOW, BELOW: ABOVE, NEAR: NEAR}


def _lines(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.replace("\n", ",").split(",") if phrase.strip())


PREPOSITIONS = {
    ABOVE: _lines(
        """
        above, over, atop, on, upon, onto, on top of, on the top of, higher than, higher up than,
        closer to the top than, up from, out of, down at, down on, down upon, down onto, down over, down toward,
        down towards, astride, aboard, north of, rains on
        """
    ),
    BELOW: _lines(
        """
        below, under, beneath, underneath, lower than, lower down than, closer to the bottom than,
        at the foot of, at the feet of, at the base of, at the bottom of, down from, from under, from beneath,
        from below, up at, up toward, up towards, suspended from, in the shade of, in the shadow of, south of,
        sat upon by, sat on by, stood on by, lain on by, perched on by
        """
    ),
    LEFT: ("west of",),
    RIGHT: ("east of",),
    NEAR: _lines(
        """
        next to, beside, besides, near, close to, alongside, adjacent to, against, in, inside, into, within, at,
        around, behind, in front of, facing, along, opposite, across from, past
        """
    ),
}
TOUCHING = word_set("on upon atop onto astride aboard")  # first words of phrases for boxes that touch

# verbs: the first form, then irregular ones as present/past/participle
OVER = _lines(
    """
        overlook, top, crown, cap, straddle, ride/rode/ridden, mount, span, overhang/overhung/overhung,
        surmount, overshadow, shade, cover, dwarf, bestride, blanket, cross, bridge, overtop, roof, canopy,
        arch over, tower over, tower above, loom over, watch over, hover over, drape over, pin down, press down,
        weigh down, crush, trample, adorn, decorate, illuminate, occupy, eclipse, shelter,
        rise from/rose from/risen from, emerge from, grow from/grew from/grown from, sprout from, pour into,
        drip into, descend on, descend upon, land on, fall on/fell on/fallen on
        """
)
UNDER = _lines(
    """
        support, underlie, underpin, hold up/held up/held up, prop up, uphold/upheld/upheld, lift, hoist,
        hang from/hung from/hung from, hang off/hung off/hung off, dangle from, dangle off, droop from,
        drip from, sway from, swing from/swung from/swung from, trail from, drop from, descend from,
        fall from/fell from/fallen from, pour from
        """
)
CARRIERS = _lines("carried by, borne by, transported by, cushioned by")  # but "she carries a bag" says no side
WITH = _lines(  # passives in which what follows lies on top: "a cake topped with cherries"
    """
        topped, crowned, capped, covered, garnished, decorated, adorned, sprinkled, drenched, coated,
        surmounted, blanketed, strewn, dusted, drizzled, laden, loaded, piled, heaped, stacked, shaded, glazed,
        layered, smothered, draped, finished
        """
)

# places in the image, without another object
TOP = _lines(
    """
        at the top, at the very top, on the top, on top, up top, up high, high up, overhead, positioned higher,
        placed higher, slightly higher, further up, the upper part, the upper half, the top part, the top half,
        the upper third, the top third, in the upper area, the top edge, fills the top, up above, higher up,
        the top
        """
)
BOTTOM = _lines(
    """
        at the bottom, at the very bottom, on the bottom, down below, down low, low down, positioned lower,
        placed lower, slightly lower, further down, the lower part, the lower half, the bottom part,
        the bottom half, the lower third, the bottom third, the bottom edge, fills the bottom, lower down,
        down beneath, underfoot, the bottom
        """
)
MIDDLE = _lines(
    "in the middle, in the center, in the centre, at the center, at the centre, in between, centered, centred"
)


def _forms(verb: str) -> tuple[str, list[str]]:
    """Return the participle of a verb of ``OVER`` or ``UNDER``, and its active forms."""
    first, *irregular = verb.split("/")
    word, _, particle = first.partition(" ")
    tail = f" {particle}" if particle else ""
    stem = word[:-1] if word.endswith("e") else word
    if len(word) < 5 and word[-1] in "pn" and word[-2] in "aoi":
        stem += word[-1]  # topping, spanned
    present = word[:-1] + "ies" if word.endswith("ry") else word + ("es" if word.endswith(("s", "sh", "ch")) else "s")
    past = word[:-1] + "ied" if word.endswith(("ry", "fy", "py")) else stem + "ed"
    if word.endswith("py"):
        present = word[:-1] + "ies"
    active = [word + tail, present + tail, stem + "ing" + tail, irregular[0] if irregular else past + tail]
    return (irregular[1] if irregular else past + tail), active


PLACING_VERBS = frozenset(form.split()[0] for verb in (*OVER, *UNDER) for form in _forms(verb)[1])


def forward_phrases() -> dict[str, str]:
    """Return the side of each phrase that stands before its ground: "above" for "atop", "below" for "topped with"."""
    found = {phrase: side for side, phrases in PREPOSITIONS.items() for phrase in phrases}
    for side, verbs in ((ABOVE, OVER), (BELOW, UNDER)):
        for verb in verbs:
            participle, active = _forms(verb)
            found |= dict.fromkeys(active, side)
            if verb.rpartition(" ")[2] not in ("from", "into", "on", "upon", "off"):
                found[f"{participle} by"] = INVERSE[side]
    found |= dict.fromkeys(CARRIERS, ABOVE)
    return found | {f"{word} {by}": BELOW for word in WITH for by in ("with", "by", "in")}
