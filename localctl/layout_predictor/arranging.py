"""Solve all relations of a layout together: which places are left for a box when all others must still fit.

"A is left of B" means that A's box ends where B's begins, at most. Along an axis such relations form a graph. The
longest path through it to a box bounds its centre, and any centre within its bounds leaves room for all other boxes, so
boxes are placed one after the other without going back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localctl.layout_predictor.nouns import singular, typical_size
from localctl.layout_predictor.parsing import PromptObject
from localctl.layout_predictor.placing import Frame, Link, PlaceDensity, Placement
from localctl.layout_predictor.reading import AXES, Reading, Relation
from localctl.layout_predictor.relations import INVERSE, NEAR

_SMALLEST, _LARGEST = 0.1, 0.8  # sides of a box whose size is from the table
_LEAST, _MOST = 0.04, 0.96  # sides of any box
_COVERED, _MOST_COVERED, _LONGEST = 0.3, 0.5, 0.98  # shares of the image: of its area, and of its side
_TARGETS = (0.2, 0.5, 0.8)  # centres of what is said to be on the left, in the middle, on the right

Edges = dict[int, set[int]]  # a box, and the boxes that come after it along an axis


@dataclass
class Arrangement:
    """The boxes to place, one per copy of each object, and what is said of them.

    owners: the object of each box. sides: (n, 2) width and height. edges: per axis. relations: those that are kept.
    """

    owners: list[int]
    sides: Tensor
    edges: tuple[Edges, Edges]
    relations: list[Relation]
    places: dict[int, tuple[int | None, int | None]]

    def frame(self, placed: Sequence[Placement]) -> Frame:
        """Return what is left for the next box, given the boxes placed so far."""
        box = len(placed)
        place = self.places.get(self.owners[box], (None, None))
        x, y = (None if value is None else _TARGETS[value + 1] for value in place)
        return Frame(self.sides[box], *self.bounds(placed, box), self.links(placed, box), (x, y))

    def bounds(self, placed: Sequence[Placement], box: int) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest centre (2,) of a box, given the boxes placed so far."""
        low, high = torch.empty(2), torch.empty(2)
        for axis in (0, 1):
            sides = self.sides[:, axis].tolist()
            fixed = [(item.x, item.y)[axis] for item in placed]
            low[axis] = _reach(self.edges[axis], sides, fixed)[box]
            high[axis] = 1 - _reach(_reversed(self.edges[axis]), sides, [1 - value for value in fixed])[box]
        return low, high

    def links(self, placed: Sequence[Placement], box: int) -> list[Link]:
        """Return the placed boxes that a box is related to, with the side it has of them."""
        found = []
        for other, placement in enumerate(placed):
            for relation in self.relations:
                if (relation.first, relation.second) == (self.owners[box], self.owners[other]):
                    found.append(Link(placement, relation.side, relation.touching))
                elif (relation.second, relation.first) == (self.owners[box], self.owners[other]):
                    found.append(Link(placement, INVERSE[relation.side], relation.touching))
        return found


def arrange(objects: Sequence[PromptObject], reading: Reading, sizes: Tensor) -> Arrangement:
    """Arrange the boxes of ``objects``.

    A relation that contradicts those before it is left out, with a warning if the prompt states it for certain.

    Args:
        sizes: (n, 2) width and height of a box of each object.
    """
    owners = [index for index, item in enumerate(objects) for _ in range(item.count)]
    edges: tuple[Edges, Edges] = ({}, {})
    kept = []
    for relation in reading.relations:
        if relation.side != NEAR and not _add(edges, relation):
            if relation.certain:
                first, second = (objects[i].description for i in (relation.first, relation.second))
                side = relation.side + " of" * (relation.side in ("left", "right"))
                warnings.warn(
                    f"The prompt says that {first!r} is {side} {second!r}, after the opposite; the "
                    "layout follows what comes first. Say only one of them.",
                    stacklevel=4,
                )
            continue
        kept.append(relation)
    several: tuple[Edges, Edges] = ({}, {})
    for axis in (0, 1):
        for i, after in edges[axis].items():
            for box in (b for b, owner in enumerate(owners) if owner == i):
                several[axis][box] = {b for b, owner in enumerate(owners) if owner in after}
    sides = sizes[owners]
    longest = max(
        max(a + side / 2 for a, side in zip(_reach(several[axis], own, []), own, strict=True))
        for axis, own in enumerate(sides.T.tolist())
    )
    covered = float(sides.prod(dim=1).sum())
    sides = sides * min(1.0, _LONGEST / longest, (_MOST_COVERED / covered) ** 0.5)
    return Arrangement(owners, sides, several, kept, reading.places)


def _add(edges: tuple[Edges, Edges], relation: Relation) -> bool:
    """Add a relation to the graph, or return False if the graph already says the opposite."""
    axis, sign = AXES[relation.side]
    before, after = (relation.first, relation.second) if sign < 0 else (relation.second, relation.first)
    open_ends, reached = [after], {after}
    while open_ends:
        for following in edges[axis].get(open_ends.pop(), ()):
            if following not in reached:
                reached.add(following)
                open_ends.append(following)
    if before in reached:
        return False
    edges[axis].setdefault(before, set()).add(after)
    return True


def _reversed(edges: Edges) -> Edges:
    found: Edges = {}
    for before, several in edges.items():
        for after in several:
            found.setdefault(after, set()).add(before)
    return found


def _reach(edges: Edges, sides: list[float], fixed: list[float]) -> list[float]:
    """Return the lowest centre of each box along an axis, the first ones being ``fixed``."""
    earlier = _reversed(edges)
    found: dict[int, float] = dict(enumerate(fixed))

    def lowest(box: int) -> float:
        if box not in found:
            starts = [lowest(other) + (sides[other] + sides[box]) / 2 for other in earlier.get(box, ())]
            found[box] = max([sides[box] / 2, *starts])
        return found[box]

    return [lowest(box) for box in range(len(sides))]


def box_sizes(objects: Sequence[PromptObject], density: PlaceDensity, known: dict[str, list[float]] | None) -> Tensor:
    """Return the width and height (n, 2) of a box of each object, as shares of the image's sides.

    Those of the statistics ``known`` of the predictor come first, then those of the table of nouns, scaled so that they
    cover 30 % of the image together, then those that the model predicts, ``density`` (n, ...).
    """
    sizes = density.log_size.exp()
    typical = {index: size for index, item in enumerate(objects) if (size := typical_size(item.phrase)) is not None}
    area = sum(objects[index].count * width * height for index, (width, height) in typical.items())
    for index, size in typical.items():
        sizes[index] = (torch.tensor(size) * (_COVERED / area) ** 0.5).clamp(_SMALLEST, _LARGEST)
    for index, item in enumerate(objects):
        for name in (item.phrase.lower(), singular(item.phrase.lower()), item.head, singular(item.head)):
            if known and name in known:
                sizes[index] = torch.tensor(known[name])
                break
    return sizes.clamp(_LEAST, _MOST)
