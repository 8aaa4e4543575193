"""Rows that cannot be used: they are named, counted and recorded, and the run stops when there are too many."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from localctl.files import append, json_lines, open_to_append, parse_json, write_text
from localctl.labels import shorten

QUARANTINE = "quarantine.jsonl"
SHOWN = 10
_WAYS_OUT = {  # end of a reason -> advice; the first match counts
    "caption missing": "write a caption, or set data.caption_column=null to train without captions",
    "mask missing": "add it, or set data.mask_column=null to sample the masks of all rows",
    "missing": "add the file, or correct its name in the row",
    "of unknown format": "convert it, or remove the row",
    "damaged": "export the file again, or remove the row",
    "animated": "save a single frame",
    "too large": "scale it down, or raise data.max_pixels",
    "another shape": "export it with the image's shape; another size is fine",
    "outside the data": "copy it into the dataset's folder; files outside it are not read",
    "not UTF-8": "save the text as UTF-8",
    "not text": "a caption must be a text or a list of texts",
    "too long": "a caption has one paragraph; check whether this is the right file",
    "": "check the file, its name and its permissions",
}
MOST_DETAIL = 500  # characters; names in a metadata file may be of any length


class BadRow(ValueError):
    """An example cannot be used.

    reason: the kind of problem, for counting. detail: a clause without a full stop. key: the example's, where known.
    """

    def __init__(self, reason: str, detail: str, key: str = "") -> None:
        super().__init__(shorten(detail, MOST_DETAIL))
        self.reason, self.key = reason, key


class TooManyBadRows(ValueError):
    """More rows are unusable than ``data.max_bad_fraction`` allows; the message lists them."""


class Problem(NamedTuple):
    """A bad row that was read, and why it is bad."""

    key: str
    reason: str
    detail: str


def count_reasons(problems: Iterable[Problem]) -> str:
    """Format the counts of each reason: ``3 caption missing, 1 image damaged``, the most frequent first."""
    counts = Counter(problem.reason for problem in problems)
    return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def way_out(reason: str) -> str:
    """Return what the user can do about rows that are bad for ``reason``."""
    return next(advice for words, advice in _WAYS_OUT.items() if reason.endswith(words))


def too_many(bad: int, rows: int, max_fraction: float) -> bool:
    """Return whether ``bad`` of ``rows`` exceed ``max_fraction``. A single bad row never does, unless the fraction is
    0."""
    return bad > max(max_fraction * rows, 1 if max_fraction else 0)


class Quarantine:
    """The bad rows that a run has met, each once, in order; they are recorded in ``folder/quarantine.jsonl``.

    folder: None = write nothing (processes other than the first). rows: number of rows in the dataset. start: the step
    at which a resumed run continues; records of later steps are discarded, as the run meets those rows again.
    """

    def __init__(self, folder: Path | None, rows: int, max_fraction: float, start: int = 0) -> None:
        self.path = None if folder is None else folder / QUARANTINE
        self.rows, self.max_fraction = rows, max_fraction
        self.problems: dict[str, Problem] = {}
        if self.path is not None and self.path.exists():
            records = [record for line in self.path.read_bytes().split(b"\n") if (record := _record(line))]
            earlier = [record for record in records if record["step"] <= start]
            self.problems = {r["key"]: Problem(r["key"], r["reason"], r["detail"]) for r in earlier}
            if earlier:
                write_text(self.path, json_lines(earlier))
            else:
                self.path.unlink()

    def add(self, problems: Iterable[Problem], step: int) -> None:
        """Add the problems met in step ``step``. TooManyBadRows when more than ``max_fraction`` of the rows are bad."""
        new = {p.key: p for p in problems if p.key not in self.problems}
        if not new:
            return
        self.problems |= new
        if self.path is not None:
            self._append([{"step": step, **problem._asdict()} for problem in new.values()])
        if too_many(len(self.problems), self.rows, self.max_fraction):
            raise TooManyBadRows(self._too_many())

    def summary(self) -> str:
        """Return a summary in one line; empty when no row was bad."""
        if not self.problems:
            return ""
        place = f", listed in {self.path}" if self.path else ""
        number = len(self.problems)
        return f"{number} of {self.rows} rows unusable and replaced ({count_reasons(self.problems.values())}){place}"

    def _too_many(self) -> str:
        first = "; ".join(f"{shorten(p.key)}: {p.detail}" for p in list(self.problems.values())[:SHOWN])
        more = "" if len(self.problems) <= SHOWN else f"; and {len(self.problems) - SHOWN} more"
        place = f" (all in {self.path})" if self.path else ""
        return (
            f"{len(self.problems)} of {self.rows} rows of the data are unusable, more than data.max_bad_fraction="
            f"{self.max_fraction:g}{place}: {first}{more}. Repair them (python -m localctl.data check finds all) or "
            "raise data.max_bad_fraction."
        )

    def _append(self, records: Iterable[dict[str, object]]) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_to_append(self.path)
        try:
            append(descriptor, json_lines(records).encode(), self.path)
        finally:
            os.close(descriptor)


def _record(line: bytes) -> dict[str, Any] | None:
    """Read a line of the file; None for one that a killed run left incomplete, or that has other fields."""
    try:
        record = parse_json(line)
        texts = [record[name] for name in Problem._fields]
        valid = isinstance(record["step"], int) and all(isinstance(text, str) for text in texts)
    except (ValueError, TypeError, KeyError):
        return None
    return record if valid else None
