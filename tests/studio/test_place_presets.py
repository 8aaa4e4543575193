"""An image of a run with other presets than there are now, brought back to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localctl.studio.place_restore import values_of

SCENE = str(Path(__file__).parents[2] / "examples" / "scene.json")


def restored(**options: Any) -> dict[str, Any]:
    return values_of({"layout": [SCENE], **options}, "micro", (128, 128))


def test_presets_that_the_page_shows_come_back() -> None:
    then = {"bias": ["bias.strength=1.5", "bias.outside_strength=0.5"]}
    values = restored(control=["bias"], presets=then)
    assert (values["bias.strength"], values["bias.outside_strength"]) == (1.5, 0.5)
    changed = restored(control=["bias"], presets=then, set=["strength=3"])
    assert (changed["bias.strength"], changed["bias.outside_strength"]) == (3, 0.5)


def test_a_comparison_with_other_presets_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias.strength=1.5, which is no longer the preset"):
        restored(compare=["none", "bias"], presets={"bias": ["bias.strength=1.5"]})
