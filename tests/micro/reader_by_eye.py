"""The reader against 260 generated images that were labelled by eye before any reading.

  python tests/micro/reader_by_eye.py           prints what it gets right and wrong, for each part of the images

``reader_labels.webp`` holds the images (see ``reader_images.py``), ``reader_labels.json`` what was seen in each. The
reader's thresholds were set on the first part. The second was kept aside and then looked at once: its rings led to the
templates of thick rings. The third was generated, labelled and measured when nothing was changed any more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from localctl.micro.detect import Detection, Reading, detect
from localctl.micro.scenes import SIZE
from localctl.micro.shapes import SHAPES

HERE = Path(__file__).parent
ROW = 20  # images side by side
SKIPPED = 100  # layouts of `val` before the first of these images, see ``reader_images.py``
PARTS = ("to set thresholds", "kept aside", "fresh")
REACH = 24.0  # px between the middle of what was seen, which is rough, and of what was read
RIGHT, SHAPE, COLOR, MISSED = "right", "wrong shape", "wrong colour", "missed"


@dataclass(frozen=True)
class Seen:
    """An object as it was seen. colors, shapes: any of them would do; no shape: it has none that has a name."""

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    center: tuple[float, float]
    doubtful: bool

    @classmethod
    def of(cls, text: str) -> Seen:
        colors, shapes, x, y = text.split()
        named = tuple(shapes.rstrip("~").split("/")) if shapes != "?" else ()
        return cls(tuple(colors.split("/")), named, (float(x) * SIZE / 10, float(y) * SIZE / 10), shapes.endswith("~"))


def images() -> list[np.ndarray]:
    """uint8 (128, 128, 3) each."""
    sheet = np.asarray(Image.open(HERE / "reader_labels.webp").convert("RGB"))
    places = [(r, c) for r in range(0, sheet.shape[0], SIZE) for c in range(0, sheet.shape[1], SIZE)]
    return [sheet[r : r + SIZE, c : c + SIZE] for r, c in places]


def labels() -> list[tuple[str, list[Seen]]]:
    """Background and objects of each image."""
    seen = json.loads((HERE / "reader_labels.json").read_text())["seen"]
    return [(background, [Seen.of(text) for text in objects]) for background, *objects in seen]


def part(name: str) -> list[int]:
    """The images of one of ``PARTS``: even and odd rows of the first ten, and the others."""
    number = PARTS.index(name)
    return [i for i in range(len(labels())) if (2 if i >= 10 * ROW else i // ROW % 2) == number]


def matched(seen: Sequence[Seen], read: Sequence[Detection]) -> list[Detection | None]:
    """For each object the reading in its place, of its colour if there is one."""
    result: list[Detection | None] = [None] * len(seen)
    if not seen or not read:
        return result
    far = np.array([[np.hypot(s.center[0] - r.center[0], s.center[1] - r.center[1]) for r in read] for s in seen])
    cost = far + np.array([[0 if r.color in s.colors else REACH / 2 for r in read] for s in seen])
    for i, j in zip(*linear_sum_assignment(np.where(far <= REACH, cost, 1000)), strict=True):
        if far[i, j] <= REACH:
            result[i] = read[j]
    return result


def verdict(seen: Seen, read: Detection | None) -> str:
    if read is None:
        return MISSED
    if read.shape not in seen.shapes:
        return SHAPE
    return RIGHT if read.color in seen.colors else COLOR


@dataclass
class Tally:
    """named: verdicts on objects with a name. by: the same by kind. confused: (seen, read) shapes. nameless: whether
    objects without a name were read as something. invented: readings where nothing was seen. backgrounds: right."""

    named: Counter[str]
    by: dict[str, Counter[str]]
    confused: Counter[tuple[str, str]]
    nameless: Counter[str]
    invented: int
    backgrounds: int
    images: int
    wrong: list[str]


def tally(indices: Sequence[int], reader: Callable[[np.ndarray], Reading] = detect) -> Tally:
    """What ``reader`` makes of these images."""
    result = Tally(Counter(), {}, Counter(), Counter(), 0, 0, len(indices), [])
    stored, all_labels = images(), labels()
    for index in indices:
        background, seen = all_labels[index]
        reading = reader(stored[index])
        result.backgrounds += reading.background == background
        pairs = list(zip(seen, matched(seen, reading.objects), strict=True))
        result.invented += len(reading.objects) - sum(read is not None for _, read in pairs)
        for thing, read in pairs:
            if not thing.shapes:
                result.nameless["left out" if read is None else "read"] += 1
                continue
            what = verdict(thing, read)
            result.named[what] += 1
            shape = "/".join(sorted(thing.shapes))
            for kind in (shape, thing.colors[0], "in doubt" if thing.doubtful else "sure"):
                result.by.setdefault(kind, Counter())[what] += 1
            if what != RIGHT:
                result.confused[shape, "nothing" if read is None else read.shape] += 1
                result.wrong.append(f"#{index} {thing.colors[0]} {shape}: {read.phrase if read else 'nothing'}")
    return result


def asked_for(reader: Callable[[np.ndarray], Reading] = detect) -> Counter[tuple[str, bool]]:
    """Of the objects that the images were asked to show: whether the eye sees one ("yes"; "perhaps" where another name
    would do as well, or with doubt; "no"), and whether ``reader`` finds one."""
    from research.layout_benchmark.cases import cases  # torch is slow to import

    stored, all_labels, result = images(), labels(), Counter[tuple[str, bool]]()
    chosen = cases(SKIPPED + len(stored), "val")[SKIPPED:]
    for image, (_, seen), case in zip(stored, all_labels, chosen, strict=True):
        reading = reader(image)
        for color, shape in case.objects:
            fitting = [thing for thing in seen if color in thing.colors and shape in thing.shapes]
            sure = any(len(thing.shapes) == len(thing.colors) == 1 and not thing.doubtful for thing in fitting)
            what = "yes" if sure else "perhaps" if fitting else "no"
            result[what, reading.has(f"{color} {shape}")] += 1
    return result


def interval(hits: int, count: int) -> str:
    """A share with its 95 % interval (Wilson's)."""
    if not count:
        return "-"
    z, share = 1.96, hits / count
    middle = (share + z * z / 2 / count) / (1 + z * z / count)
    width = z * np.sqrt(share * (1 - share) / count + z * z / 4 / count**2) / (1 + z * z / count)
    return f"{share:.3f} [{middle - width:.3f}, {middle + width:.3f}]"


def table(result: Tally) -> str:
    verdicts, count = (RIGHT, SHAPE, COLOR, MISSED), result.named.total()
    lines = [f"| | objects | {' | '.join(verdicts)} |", f"|---|---|{'---|' * len(verdicts)}"]
    cells = " | ".join(interval(result.named[name], count) for name in verdicts)
    lines.append(f"| all | {count} | {cells} |")
    shapes = [kind for kind in result.by if kind.split("/")[0] in SHAPES]
    for kind in ("sure", "in doubt", *sorted(shapes), *sorted(set(result.by) - {"sure", "in doubt", *shapes})):
        found = result.by.get(kind, Counter())
        lines.append(f"| {kind} | {found.total()} | {' | '.join(str(found[name]) for name in verdicts)} |")
    nameless = result.nameless.total()
    return "\n".join(
        [
            *lines,
            "",
            f"Of {nameless} objects without a name {result.nameless['read']} are read as one that has; readings where "
            f"nothing was seen: {result.invented}; backgrounds right: {result.backgrounds} of {result.images}.",
            "Seen and read instead: "
            + ", ".join(f"{seen} -> {read} {n}" for (seen, read), n in result.confused.most_common()),
        ]
    )


if __name__ == "__main__":
    for name in PARTS:
        print(f"\n{name}: {len(part(name))} images\n\n{table(tally(part(name)))}")
    print("\nOf the objects asked for, all images:")
    found = asked_for()
    for what in ("yes", "perhaps", "no"):
        print(f"  seen by eye: {what}: {found[what, True]} found by the reader, {found[what, False]} not")
