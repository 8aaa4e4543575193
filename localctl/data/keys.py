"""Names of rows in Arrow memory: a fraction of what Python's texts take, and not copied by worker processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc

_AT_ONCE = 10_000


class Keys(Sequence[str]):
    """Texts in a column of Arrow; equal to any sequence of the same texts."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        # Combined, as a text in one of several chunks takes longer to find.
        self._texts = pa.concat_arrays(column.cast(pa.large_string()).chunks or [pa.array([], pa.large_string())])

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._texts[index].as_py()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_ONCE):
            yield from self._texts.slice(first, _AT_ONCE).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as that of a list


def unique(names: Iterable[str] | pa.ChunkedArray) -> Keys:
    """Return ``names`` with #2, #3 ... appended to the second and later occurrences."""
    column = names if isinstance(names, pa.ChunkedArray) else text_column(names)
    if pc.count_distinct(column).as_py() == len(column):
        return Keys(column)
    return Keys(text_column(_numbered(name for chunk in column.chunks for name in chunk.to_pylist())))


def text_column(names: Iterable[str]) -> pa.ChunkedArray:
    """Return texts as a column; half a surrogate pair, which cannot be encoded, becomes a question mark."""
    names, chunks = iter(names), []
    while part := [name.encode(errors="replace") for name in islice(names, _AT_ONCE)]:
        chunks.append(pa.array(part, pa.large_binary()).cast(pa.large_string()))
    return pa.chunked_array(chunks, pa.large_string())


def _numbered(names: Iterable[str]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"
