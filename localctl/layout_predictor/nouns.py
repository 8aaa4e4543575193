"""Sizes and kinds of common nouns: a prior made by hand, not measured.

Each entry is noun, width, height: of a typical specimen as it stands or lies in a photograph, in metres. Only ratios
matter. A predictor that was trained on annotations brings statistics of its own (``LayoutPredictor.config["sizes"]``).
"""

from __future__ import annotations

import math
from functools import lru_cache

from localctl.phrases import word_set

_TABLE = """
person: person .5 1.7, man .5 1.8, woman .5 1.7, boy .4 1.3, girl .4 1.3, child .4 1.1, baby .5 .4, toddler .35 .8,
  rider .5 1.5, farmer .5 1.75, nurse .5 1.7, chef .5 1.8, waiter .5 1.75, knight .6 1.8, king .6 1.8,
  queen .6 1.75, soldier .5 1.8, monk .5 1.7, fisherman .5 1.75, dancer .6 1.7, wizard .6 1.9, witch .6 1.8,
  player .6 1.8, skier .7 1.7, surfer .7 1.6, astronaut .8 1.9, teacher .5 1.75, doctor .5 1.75, lady .5 1.7,
  gentleman .5 1.8, grandmother .5 1.6, grandfather .5 1.7, student .5 1.7, pirate .6 1.75, sailor .5 1.75,
  clown .6 1.8, princess .6 1.7, prince .5 1.75, bride .7 1.7, guard .5 1.8, diver .6 1.7, people 1.6 1.7,
  couple 1 1.7, crowd 4 1.7, family 2 1.7
animal: animal 1 .8, cat .45 .35, kitten .3 .22, dog .75 .6, puppy .4 .3, horse 2.2 1.7, pony 1.6 1.2, cow 2.3 1.5,
  bull 2.4 1.6, sheep 1.2 .9, lamb .7 .6, goat 1.1 .9, pig 1.3 .8, elephant 5 3, giraffe 2.5 5, zebra 2.2 1.5,
  lion 2 1.2, tiger 2.2 1, bear 1.9 1.3, wolf 1.3 .85, fox .9 .45, deer 1.6 1.4, rabbit .4 .3, hare .5 .35,
  mouse .1 .06, rat .25 .1, squirrel .3 .25, hedgehog .25 .15, monkey .5 .6, panda 1.4 1, koala .5 .6,
  kangaroo 1 1.5, camel 2.8 2.1, donkey 1.6 1.2, llama 1.2 1.7, hippo 3.5 1.5, rhino 3.5 1.6, crocodile 3.5 .5,
  snake 1.2 .2, lizard .3 .1, turtle .7 .35, tortoise .6 .35, frog .15 .1, toad .15 .1, fish .4 .2,
  goldfish .15 .08, shark 3.5 1.2, whale 12 3, dolphin 2.2 .8, octopus 1 .8, crab .25 .12, starfish .25 .25,
  jellyfish .4 .6, snail .08 .06, dragon 6 4, unicorn 2.2 1.8, dinosaur 8 4, bat .35 .2, bee .03 .03,
  butterfly .1 .08, spider .08 .06, ant .02 .01, ladybug .02 .02, beetle .04 .03
dog: poodle .6 .6, corgi .6 .4, dachshund .6 .3, pug .45 .4, bulldog .6 .45, sheepdog .9 .7, labrador .9 .7,
  terrier .5 .4, greyhound 1 .75, beagle .6 .4, husky .9 .65, hound .9 .7, dalmatian .9 .65
bird: bird .25 .2, owl .3 .45, eagle .9 .6, hawk .6 .4, crow .45 .3, raven .5 .35, parrot .3 .5, toucan .4 .45,
  pigeon .3 .25, dove .3 .25, gull .6 .35, seagull .6 .35, duck .5 .35, goose .8 .7, swan 1.2 .9, chicken .45 .45,
  rooster .5 .55, penguin .4 .8, flamingo .6 1.3, heron .6 1, stork .8 1.1, peacock 1.3 1.1, sparrow .14 .1,
  robin .14 .12, magpie .4 .25, ostrich 1.2 2.3, pelican 1.3 1, albatross 2 .8
vehicle: vehicle 4.3 1.6, car 4.3 1.5, taxi 4.4 1.6, truck 7 3, lorry 7 3, van 5 2.2, bus 10 3.2, tram 14 3.4,
  train 20 4, bicycle 1.7 1.05, bike 1.7 1.05, motorcycle 2.1 1.2, motorbike 2.1 1.2, scooter 1.7 1.1,
  tractor 4 2.8, ambulance 6 2.6, jeep 4 1.8, wagon 3 2, carriage 3.5 2.3, airplane 20 6, plane 20 6, jet 20 6,
  helicopter 10 3.5, rocket 4 20, spaceship 15 5, balloon .3 .4, blimp 30 10, boat 6 2.5, ship 40 20, sailboat 7 9,
  canoe 5 .6, kayak 4 .5, ferry 40 12, submarine 30 7, raft 3 .6, rowboat 4 .9, yacht 12 10, skateboard .8 .15,
  sled 1.2 .4, snowboard 1.5 .3, surfboard 2 .5, wheelchair .8 1, stroller .8 1, cart 1.8 1.2
building: building 15 15, house 10 8, cottage 8 6, cabin 7 5, barn 14 9, church 14 22, cathedral 40 50,
  castle 50 35, tower 8 40, lighthouse 6 25, windmill 12 16, skyscraper 30 120, temple 20 14, pyramid 120 80,
  bridge 40 10, pier 40 5, shed 3 2.5, tent 3 2, igloo 4 2.5, garage 6 3, stadium 150 40, fountain 4 3,
  statue 1.5 3, gate 3 2.5, fence 6 1.2, wall 6 2.5, well 1.5 2
furniture: furniture 1.5 1, table 1.5 .8, desk 1.4 .8, chair .5 .95, armchair .9 .95, stool .4 .6, bench 1.6 .85,
  sofa 2 .85, couch 2 .85, bed 2.1 1, cradle .9 .8, wardrobe 1.4 2, cupboard 1 1.8, cabinet 1 1.6, bookcase 1 2,
  bookshelf 1 1.8, shelf 1.2 .3, dresser 1.2 1, nightstand .5 .6, mirror .6 1, rug 2 .5, carpet 2.5 .6,
  curtain 1.2 2.2, lamp .35 .6, chandelier .9 .8, lantern .25 .4, candle .08 .25, clock .35 .35, vase .2 .35,
  painting .8 .6, poster .6 .8, pillow .6 .35, blanket 1.5 .6, fireplace 1.4 1.2, piano 1.5 1.2, door .9 2.1,
  window 1.2 1.4, ladder .5 3, toilet .45 .75, sink .6 .3, bathtub 1.7 .6, oven .6 .7, stove .6 .9,
  refrigerator .8 1.8, fridge .8 1.8, microwave .5 .3, toaster .35 .22, kettle .25 .28, teapot .25 .2,
  television 1.1 .65, tv 1.1 .65, monitor .6 .4, laptop .35 .25, keyboard .45 .12, telephone .25 .15, phone .08 .16,
  remote .06 .18, radio .35 .22, typewriter .4 .3
thing: cup .09 .1, mug .1 .1, glass .08 .14, bottle .08 .3, bowl .2 .1, plate .26 .1, fork .04 .2, knife .04 .24,
  spoon .05 .2, basket .4 .35, box .4 .35, crate .6 .5, barrel .6 .9, bucket .3 .35, bag .4 .4, backpack .35 .5,
  handbag .35 .3, suitcase .6 .45, umbrella 1 .9, hat .3 .2, shoe .3 .12, shoes .3 .15, boots .35 .4, glove .12 .25,
  tie .1 .5, scarf .3 1, book .2 .25, newspaper .4 .5, map .6 .45, ball .25 .25, kite .8 1, frisbee .27 .12,
  racket .3 .7, skis .3 1.7, teddy .3 .4, doll .2 .4, toy .2 .2, drum .5 .5, guitar .4 1, violin .25 .6,
  cello .5 1.25, trumpet .5 .2, accordion .45 .4, toothbrush .02 .19, drier .2 .22, dryer .2 .22, scissors .1 .2,
  helmet .3 .28, sword .15 1, flag 1.2 .9, sign .7 .7, mailbox .4 1.1, lamppost .5 4, hydrant .4 .8, wheel .6 .6,
  telescope .8 1.3, camera .15 .1, anchor .8 1.1, log 1.5 .35, hammock 2.5 .8, swing .6 1.8, trampoline 3 .8,
  campfire .8 .7, snowman .8 1.6, scarecrow 1.2 1.7
food: pizza .32 .2, cake .28 .2, pie .26 .12, sandwich .16 .1, burger .12 .1, donut .1 .07, apple .08 .08,
  orange .08 .08, banana .2 .1, pear .08 .1, lemon .08 .06, strawberry .03 .04, pumpkin .35 .3, melon .25 .22,
  broccoli .15 .15, carrot .18 .05, bread .3 .14, cheese .2 .12, egg .06 .06, tomato .07 .06, pineapple .14 .3
nature: tree 6 9, oak 9 11, pine 5 12, palm 4 9, willow 8 9, bush 1.5 1.2, flower .1 .3, rose .1 .4,
  sunflower .3 1.5, cactus .6 1.4, mushroom .12 .12, plant .5 .8, hill 60 20, mountain 300 150, volcano 300 150,
  cliff 60 50, rock 1.5 1, stone .4 .3, waterfall 8 20, river 40 8, lake 80 15, sea 200 40, ocean 200 40,
  island 80 20, beach 80 15, field 80 15, meadow 60 12, forest 80 30, garden 15 5, cloud 60 20, moon 20 20,
  sun 20 20, rainbow 120 60, sky 200 80, road 60 10, street 60 10, path 20 4, snow 40 8, grass 20 3
"""
# words that name a kind: "the bird" after "an owl"
_KIND_WORDS = {
    "animal": ("animal", "bird", "dog"), "creature": ("animal", "bird", "dog"), "bird": ("bird",), "dog": ("dog",),
    "vehicle": ("vehicle",), "person": ("person",), "building": ("building",),
}  # fmt: skip
_IRREGULAR = {
    "men": "man",
    "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth",
    "wolves": "wolf", "knives": "knife", "shelves": "shelf", "leaves": "leaf", "calves": "calf", "loaves": "loaf",
    "scarves": "scarf", "people": "people", "oxen": "ox", "cacti": "cactus", "fishermen": "fisherman",
}  # fmt: skip
_SAME = word_set("glasses scissors skis series species news lens bus gas canvas atlas chess cactus octopus christmas")


@lru_cache(maxsize=1)
def nouns() -> dict[str, tuple[str, float, float]]:
    """Return (kind, width, height) of each noun of the table."""
    found = {}
    kind = ""
    for line in _TABLE.strip().splitlines():
        head, colon, rest = line.partition(":")
        kind = head.strip() if colon else kind
        for entry in (rest if colon else line).split(","):
            if entry.strip():
                name, width, height = entry.split()
                found[name] = kind, float(width), float(height)
    return found


def singular(noun: str) -> str:
    """Return the singular of a noun in lower case, or the noun itself."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun in _SAME or not noun.endswith("s") or noun.endswith(("ss", "us", "is", "'s")) or len(noun) < 4:
        return noun
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if noun.endswith(("shes", "ches", "xes", "sses", "oes", "zes")):
        return noun[:-2]
    return noun[:-1]


def known_noun(phrase: str) -> str | None:
    """Return the noun of the table that a phrase names: its last word, or the one before "of"."""
    words = phrase.lower().replace("’", "'").split()
    if "of" in words[1:]:
        words = words[: words.index("of", 1)]
    for word in (words[-1], singular(words[-1])) if words else ():
        if word in nouns():
            return word
    return None


def kind_of(phrase: str) -> str | None:
    """Return the kind of a phrase's noun, such as "person" or "bird", or None if it is not in the table."""
    noun = known_noun(phrase)
    return None if noun is None else nouns()[noun][0]


def names_kind(word: str, kind: str | None) -> bool:
    """Return whether ``word`` may name a thing of this kind: "the bird" an owl."""
    return kind in _KIND_WORDS.get(word, ())


def typical_size(phrase: str) -> tuple[float, float] | None:
    """Return the width and height in an image, up to a common factor, of what ``phrase`` names; None if unknown.

    Photographers step back for large things, so sizes in an image differ less than sizes in metres: to the power 0.4,
    and no more than for a thing of seven metres.
    """
    noun = known_noun(phrase)
    if noun is None:
        return None
    _, width, height = nouns()[noun]
    scale = min(7.0, math.sqrt(width * height)) ** 0.4
    aspect = min(3.0, max(1 / 3, width / height)) ** 0.5
    return scale * aspect, scale / aspect
