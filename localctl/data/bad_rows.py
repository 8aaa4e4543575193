"""Rows that cannot be used: named, counted and written down, and a run stopped when they are too many."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from localctl.files import append, json_lines, open_to_append, parse_json, write_text
from localctl.labels import brief

QUARANTINE = "quarantine.jsonl"
SHOWN = 10
_WAYS_OUT = {  # by the end of the reason, the first that fits
    "caption missing": "write a caption, or data.caption_column=null to train without any",
    "mask missing": "add it, or take the masks from all rows (data.mask_column=null) to have them sampled",
    "missing": "add the file, or correct its name in the row",
    "not a picture": "convert it, or take the row out",
    "damaged": "export the file again, or take the row out",
    "animated": "save a single frame",
    "too large": "scale it down, or raise data.max_pixels",
    "another shape": "export it with the image's shape; another size is fine",
    "outside the data": "copy it into the data's folder; nothing outside is read",
    "not UTF-8": "save the text as UTF-8",
    "not text": "a caption is a text or a list of texts",
    "too long": "a caption has one paragraph; is this another file?",
    "": "look at the file, its name and its access rights",
}
MOST_DETAIL = 500  # letters; names in somebody's list may have any number


class BadRow(ValueError):
    """An example that cannot be used. reason: the kind of trouble, for counting; detail: a clause without full stop;
    key: of the example, where it is known."""

    def __init__(self, reason: str, detail: str, key: str = "") -> None:
        super().__init__(brief(detail, MOST_DETAIL))
        self.reason, self.key = reason, key


class TooManyBadRows(ValueError):
    """So many rows are unusable that something else must be wrong; the message lists them."""


class Problem(NamedTuple):
    """A visit to a bad row."""

    key: str
    reason: str
    detail: str


def count_reasons(problems: Iterable[Problem]) -> str:
    """Put kinds of trouble into words: ``3 caption missing, 1 image damaged``, the most frequent first."""
    counts = Counter(problem.reason for problem in problems)
    return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def way_out(reason: str) -> str:
    """Say what can be done about rows that are bad for ``reason``."""
    return next(advice for words, advice in _WAYS_OUT.items() if reason.endswith(words))


def too_many(bad: int, rows: int, max_fraction: float) -> bool:
    """Tell whether ``bad`` of ``rows`` are more than that share: one never is, however few there are, unless the share
    is 0."""
    return bad > max(max_fraction * rows, 1 if max_fraction else 0)


class Quarantine:
    """The bad rows a run has met, in the order it met them, each once, kept in ``folder/quarantine.jsonl``.

    rows: how many the data has. A run that continues at step ``start`` keeps what was met up to there and forgets the
    rest, which it will meet again. ``folder`` None: nothing is written (processes other than the first).
    """

    def __init__(self, folder: Path | None, rows: int, max_fraction: float, start: int = 0) -> None:
        self.path = None if folder is None else folder / QUARANTINE
        self.rows, self.max_fraction = rows, max_fraction
        self.problems: dict[str, Problem] = {}
        if self.path is not None and self.path.exists():
            records = [record for line in self.path.read_bytes().split(b"\n") if (record := _record(line))]
            kept = [record for record in records if record["step"] <= start]
            self.problems = {r["key"]: Problem(r["key"], r["reason"], r["detail"]) for r in kept}
            if kept:
                write_text(self.path, json_lines(kept))
            else:
                self.path.unlink()

    def add(self, problems: Iterable[Problem], step: int) -> None:
        """Take in what step ``step`` met. TooManyBadRows when more than ``max_fraction`` of the rows are bad."""
        new = {p.key: p for p in problems if p.key not in self.problems}
        if not new:
            return
        self.problems |= new
        if self.path is not None:
            self._append([{"step": step, **problem._asdict()} for problem in new.values()])
        if too_many(len(self.problems), self.rows, self.max_fraction):
            raise TooManyBadRows(self._too_many())

    def summary(self) -> str:
        """Sum up in one line, empty when no row was bad."""
        if not self.problems:
            return ""
        place = f", listed in {self.path}" if self.path else ""
        number = len(self.problems)
        return f"{number} of {self.rows} rows unusable and replaced ({count_reasons(self.problems.values())}){place}"

    def _too_many(self) -> str:
        first = "; ".join(f"{brief(p.key)}: {p.detail}" for p in list(self.problems.values())[:SHOWN])
        more = "" if len(self.problems) <= SHOWN else f"; and {len(self.problems) - SHOWN} more"
        place = f" (all in {self.path})" if self.path else ""
        return (
            f"{len(self.problems)} of {self.rows} rows of the data are unusable, over data.max_bad_fraction="
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
    """Read a line of the list; None for one that a killed run left half written, or that is not ours."""
    try:
        record = parse_json(line)
        texts = [record[name] for name in Problem._fields]
        ours = isinstance(record["step"], int) and all(isinstance(text, str) for text in texts)
    except (ValueError, TypeError, KeyError):
        return None
    return record if ours else None
