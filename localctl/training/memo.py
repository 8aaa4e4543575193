"""Encodings that are kept in memory, so that each is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, Self, TypeVar

MEMO_BYTES = 512 * 2**20


class Rows(Protocol):
    """Rows of the same size, one for each name."""

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Self: ...

    def clone(self) -> Self: ...


Kept = TypeVar("Kept", bound=Rows)


class Memo(Generic[Kept]):
    """Results of a pure function by name, kept until ``max_bytes`` are full; nothing is ever thrown out.

    What is missing is computed at once, in a batch that is filled up to the same number of rows each time. A network
    computes a row of such a batch to the same bits whatever its place and the other rows. So a resumed run, which
    starts with an empty memo, gets bit-equal results.
    """

    def __init__(self, max_bytes: int = MEMO_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: dict[str, Kept] = {}
        self._bytes = 0

    def get(self, names: Sequence[str], compute: Callable[[list[int]], Kept], rows: int) -> dict[str, Kept]:
        """Return the values of ``names``, one row each. ``compute`` returns those of the positions it is given: of the
        missing ones, and repeats of the first until there are ``rows``."""
        position: dict[str, int] = {}
        for place, name in enumerate(names):
            position.setdefault(name, place)
        missing = [name for name in position if name not in self._kept]
        new: dict[str, Kept] = {}
        if missing:
            places = [position[name] for name in missing]
            found = compute(places + places[:1] * (rows - len(places)))
            if len(missing) < rows:
                found = found[: len(missing)].clone()  # without the memory of the repeats
            new = {name: found[row : row + 1] for row, name in enumerate(missing)}
            if self._bytes + found.nbytes <= self.max_bytes:
                self._bytes += found.nbytes
                self._kept |= new
        return {name: new[name] if name in new else self._kept[name] for name in position}
