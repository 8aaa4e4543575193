"""Placed scenes from annotations in MSCOCO's format: ``instances_*.json`` (things) and ``stuff_*.json`` (stuff)."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from localctl.coco import coco_box, coco_id, is_crowd
from localctl.files import parse_json
from localctl.layout_checks import Box
from localctl.seeding import numpy_rng
from research.layout_predictor.captions import PlacedScene

_LEFT_OUT = ("other", "things", "stuff")  # words without meaning; "other" alone is stuff's class of all things


class CocoLayouts:
    """Images with at least two things whose class occurs once in the image.

    Args:
        instances: annotation file of things.
        stuff: annotation file of stuff, or None.
        count: most images to read, in the order of their ids.
        min_area: things that cover a smaller share of the image are left out, as are crowds.
        max_objects: most things per image; the largest are taken.

    Raises:
        ValueError: a file is missing or has another format, or no image qualifies.
    """

    name = "coco"
    symmetries = "x"  # up and down differ in photos

    def __init__(
        self,
        instances: str | Path,
        stuff: str | Path | None = None,
        count: int | None = None,
        min_area: float = 0.02,
        max_objects: int = 3,
    ) -> None:
        sizes: dict[int | str, tuple[float, float]] = {}
        things: dict[int | str, list[tuple[str, np.ndarray]]] = {}
        for path in (instances, stuff) if stuff is not None else (instances,):
            for image, name, box in _read(Path(path), sizes):
                if box[2] * box[3] >= min_area:
                    things.setdefault(image, []).append((name, box))
        self.scenes: list[PlacedScene] = []
        for image in sorted(things, key=lambda image: (isinstance(image, str), image)):
            if count is not None and len(self.scenes) == count:
                break
            scene = _scene(image, things[image], max_objects)
            if scene is not None:
                self.scenes.append(scene)
        if not self.scenes:
            raise ValueError(f"{instances} has no image with two different things that are large enough; use another.")

    def __len__(self) -> int:
        return len(self.scenes)

    def sizes(self) -> dict[str, list[float]]:
        """Return the median width and height of each class in the scenes, as shares of the image's sides."""
        found: dict[str, list[np.ndarray]] = {}
        for scene in self.scenes:
            for name, box in zip(scene.names, scene.boxes, strict=True):
                found.setdefault(name, []).append(box[2:])
        return {name: [round(float(x), 4) for x in np.median(found[name], axis=0)] for name in sorted(found)}

    def __getitem__(self, index: int) -> PlacedScene:
        return self.scenes[index]


def _read(path: Path, sizes: dict[int | str, tuple[float, float]]) -> list[tuple[int | str, str, np.ndarray]]:
    """Return (image, name, box) of each annotation; box (4,): centre x, y, width, height as fractions of the image."""
    try:
        content = parse_json(path.expanduser().read_bytes())
        sizes |= {coco_id(item["id"]): (float(item["width"]), float(item["height"])) for item in content["images"]}
        names = {coco_id(item["id"]): plain_name(item["name"]) for item in content["categories"]}
        found = [
            (coco_id(item["image_id"]), name, item.get("bbox"))
            for item in content["annotations"]
            if not is_crowd(item) and (name := names[coco_id(item["category_id"])])
        ]
        boxes = [(image, name, coco_box(box, *sizes[image])) for image, name, box in found]
    except OSError as error:
        raise ValueError(f"The annotations {path} cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{path} is not an annotation file in MSCOCO's format ({reason}); give instances_*.json."
        ) from error
    lost = sum(box is None for _, _, box in boxes)
    if lost:
        warnings.warn(f"{lost} of {len(boxes)} boxes in {path} are left out: no area in their image.", stacklevel=3)
    return [(image, name, _centred(box)) for image, name, box in boxes if box is not None]


def plain_name(name: str) -> str:
    """Return the plain name of a class, as "brick wall" for "wall-brick" and "sky" for "sky-other".

    It is empty for a class to leave out.
    """
    words = [word for word in name.lower().replace("_", " ").split("-") if word not in _LEFT_OUT]
    return " ".join(reversed(words)).strip()


def _centred(box: Box) -> np.ndarray:
    corners = np.array(box)
    return np.concatenate([(corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]])


def _scene(image: int | str, things: list[tuple[str, np.ndarray]], most: int) -> PlacedScene | None:
    """Return the largest things whose class occurs once in the image, in an order fixed by the image's id."""
    names = [name for name, _ in things]
    single = sorted((item for item in things if names.count(item[0]) == 1), key=lambda item: -item[1][2] * item[1][3])
    if len(single) < 2:
        return None
    chosen = single[:most]
    order = numpy_rng(0, "coco", image).permutation(len(chosen))
    return PlacedScene(
        f"coco-{image}", tuple(chosen[i][0] for i in order), np.stack([chosen[i][1] for i in order]).astype(float)
    )
