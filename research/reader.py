"""Which version of the reader of micro scenes a result was read by. Results of two do not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localctl.evaluation.provenance import read_json
from localctl.micro.detect import VERSION


def reader_version(asked: Mapping[str, Any]) -> int:
    """Of a result, by what was asked of it; the first ones do not say."""
    return int(asked.get("reader", 1))


def check_reader(folder: Path, waiting: Sequence[str]) -> None:
    """ValueError when results that are ``waiting`` to be made would stand in ``folder`` beside others of another
    version."""
    there = {reader_version(read_json(path, "result").get("asked", {})) for path in folder.glob("*.json")}
    if waiting and there - {VERSION}:
        raise ValueError(
            f"The results in {folder} were read by version {min(there)} of the reader, now {VERSION}; "
            f"choose another --report for {', '.join(waiting)}, or remove them."
        )


def reader_note(asked: Mapping[str, Any], begin: str = "Read") -> list[str]:
    """What a page says of results of an earlier version; ``begin`` names the figures that the reader read."""
    version = reader_version(asked)
    if version == VERSION:
        return []
    return [
        f"*{begin} by version {version} of the reader of micro scenes. Version {VERSION} finds objects that it missed, "
        "stars and rings above all:",
        "[what that changes](evaluation.md#the-reader-against-the-eye). To be measured again with the next base.*",
        "",
    ]
