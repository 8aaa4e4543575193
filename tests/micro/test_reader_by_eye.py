"""The reader against the eye: 50 generated pictures, looked at without knowing captions or readings, and the images
of ``reader_by_eye.py``, labelled object by object.

`eye_check.png` holds the pictures as they were drawn, 10 in a row; `eye_check.json` says how, and what was seen in
each: phrases ("red star"), with "?" for a shape that cannot be named ("red ?").
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from reader_by_eye import ROW, images, labels, part, tally

from localctl.micro.detect import Reading, detect
from localctl.micro.scenes import SIZE
from localctl.micro.shapes import BACKGROUNDS, COLORS, SHAPES

HERE = Path(__file__).parent
COLUMNS = 10


def pictures() -> list[np.ndarray]:
    sheet = np.asarray(Image.open(HERE / "eye_check.png").convert("RGB"))
    rows = sheet.shape[0] // SIZE
    return [
        sheet[r * SIZE : (r + 1) * SIZE, c * SIZE : (c + 1) * SIZE] for r in range(rows) for c in range(COLUMNS)
    ]  # fmt: skip


def agrees(seen: list[str], reading: Reading) -> bool:
    """Every object that has a name is read by it, nothing else is read but where a shape has no name."""
    read = [found.phrase for found in reading.objects]
    nameless = [phrase.split()[0] for phrase in seen if phrase.endswith("?")]
    for phrase in seen:
        if not phrase.endswith("?"):
            if phrase not in read:
                return False
            read.remove(phrase)
    for phrase in read:
        if phrase.split()[0] not in nameless:
            return False
        nameless.remove(phrase.split()[0])
    return True


def test_reader_and_eye_agree_on_generated_pictures() -> None:
    stored = json.loads((HERE / "eye_check.json").read_text())
    shown = pictures()
    assert len(shown) == len(stored["seen"]) == 50
    readings = [detect(image) for image in shown]
    agreed = [agrees(seen["objects"], reading) for seen, reading in zip(stored["seen"], readings, strict=True)]
    backgrounds = [s["background"] == r.background for s, r in zip(stored["seen"], readings, strict=True)]
    wrong = [i for i, right in enumerate(agreed) if not right]
    print(f"objects {sum(agreed)} of 50, backgrounds {sum(backgrounds)} of 50; objects differ in {wrong}")
    assert sum(agreed) >= 40 and sum(backgrounds) >= 48


def test_another_picture_would_not_agree() -> None:
    """The comparison can fail: readings of the picture before hardly ever fit."""
    seen = json.loads((HERE / "eye_check.json").read_text())["seen"]
    readings = [detect(image) for image in pictures()]
    assert sum(agrees(seen[i]["objects"], readings[i - 1]) for i in range(50)) <= 12


def test_most_objects_of_generated_images_are_read_as_seen() -> None:
    """On images that no threshold was set on; the reader of before got 0.81 of them right, and 2 of 20 stars."""
    result = tally(part("kept aside"))
    assert result.named["right"] >= 0.9 * result.named.total() and result.backgrounds == result.images
    assert result.by["star"]["right"] >= 0.5 * result.by["star"].total()
    assert result.by["ring"]["right"] >= 0.9 * result.by["ring"].total()
    assert result.invented <= 0.05 * result.named.total()


def test_readings_of_other_images_do_not_fit() -> None:
    """The comparison can fail."""
    stored = images()
    others = iter(stored[ROW:] + stored[:ROW])
    result = tally(range(ROW), lambda image: detect(next(others)))
    assert result.named["right"] <= 0.2 * result.named.total()


def test_every_image_has_its_labels() -> None:
    assert len(images()) == len(labels())
    assert all(background in BACKGROUNDS and seen for background, seen in labels())
    for _, seen in labels():
        for thing in seen:
            assert set(thing.colors) <= set(COLORS) and set(thing.shapes) <= set(SHAPES)
