"""Which examples are held out for validation: a hash of each key decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from localctl.labels import shorten
from localctl.seeding import key_seeds


def places_of(keys: Iterable[str]) -> np.ndarray:
    """Map each key to [0, 1] by a hash, (n,) float64. Repeated rows of one image (key#2) are at one place."""
    return np.fromiter((seed / 2**63 for seed in key_seeds(0, "validation", map(_image, keys))), np.float64)


def _image(key: str) -> str:
    """Return the name of the image of a ``key``, which is the same for repeated rows."""
    name, mark, number = key.rpartition("#")
    return name if mark and number.isdecimal() else key


def held_out(keys: Sequence[str], share: float, places: np.ndarray | None = None) -> tuple[np.ndarray, str]:
    """Return for each key whether it is held out for validation, (n,) bool, and a note.

    A key is where its place is below the share: it stays there when other rows are added or removed. But if a share
    above 0 selects none of a small dataset, the key nearest to it is held out, and the note says so. A single key is
    not held out, unless the share is 1.

    places: from :func:`places_of`, if known.
    """
    places = places_of(keys) if places is None else places
    first = places.min(initial=1.0)
    if not len(places) or (share < 1 and first == places.max()):
        return np.zeros(len(places), bool), ""
    if not 0 < share <= first:
        return places < share, ""
    chosen = keys[int(places.argmin())]
    return places == first, (
        f"data.validation_share={share:g} selects none of {len(keys)} rows, so one is held out for validation: "
        f"{shorten(chosen)}; raise data.validation_share for more"
    )
