"""What to say to somebody who wrote a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

CUTOFF = 0.75  # below, a suggestion is far-fetched


def nearest(name: str, known: Sequence[str], otherwise: str = "see --help.") -> str:
    """The end of a sentence: "did you mean X?", or ``otherwise`` when nothing known is near.

    A dotted name may also be asked for by its last part ("weight" for "loss.weight"); all that have it are named.
    """
    dashes = "--" if name.startswith("--") else ""
    same = [item for item in known if item.rsplit(".", 1)[-1].removeprefix("--") == name.removeprefix("--")]
    if not same:
        by_last_part: dict[str, list[str]] = {}
        for item in known:
            by_last_part.setdefault(dashes + item.rsplit(".", 1)[-1].removeprefix("--"), []).append(item)
        near = difflib.get_close_matches(name, [*known, *by_last_part], n=1, cutoff=CUTOFF)
        same = by_last_part.get(near[0], near) if near else []
        if near and near[0] in known:
            same = near
    return f"did you mean {' or '.join(same)}?" if same else otherwise
