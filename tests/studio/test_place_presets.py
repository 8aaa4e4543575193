"""An image of a run with other presets than there are now, brought back to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localctl.studio.place_restore import values_of

SCENE = str(Path(__file__).parents[2] / "examples" / "scene.json")


def restored(base: str = "micro", **options: Any) -> dict[str, Any]:
    return values_of({"layout": [SCENE], **options}, base, (128, 128))


def test_presets_that_the_page_shows_come_back() -> None:
    then = {"bias": ["bias.strength=1.5", "bias.outside_strength=0.5"]}
    values = restored(control=["bias"], presets=then)
    assert (values["bias.strength"], values["bias.outside_strength"]) == (1.5, 0.5)
    changed = restored(control=["bias"], presets=then, set=["strength=3"])
    assert (changed["bias.strength"], changed["bias.outside_strength"]) == (3, 0.5)


def test_a_comparison_with_other_presets_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias.strength=1.5, and the page would make it with 4.0"):
        restored(compare=["none", "bias"], presets={"bias": ["bias.strength=1.5"]})


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("micro", {"presets": {"spacetime": ["spacetime.weight=none"]}}, "spacetime.weight=None, .* make it with 1.0"),
        ("sd15", {"set": ["weight=0.5"]}, "spacetime.weight=0.5, and the page would make it with None"),
        ("micro", {"presets": {"spacetime": ["scheduler=none"]}}, "scheduler=None, .* make it with 'ddpm'"),
        ("micro", {"presets": {"spacetime": ["scheduler=ddpm", "guidance_scale=3.0"]}}, "guidance_scale=3.0, .* 4.0"),
        ("micro", {"compare": ["none"], "presets": {"none": ["guidance_scale=7.5"]}}, "guidance_scale=7.5, .* 2.0"),
    ],
)
def test_an_image_that_the_page_would_change_is_refused(base: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"The image was made with {message}"):
        restored(base, **{"control": ["spacetime"], **options})


def test_an_image_of_other_presets_brings_them_back() -> None:
    then = ["spacetime.weight=0.25", "spacetime.mix=released", "scheduler=ddpm", "guidance_scale=4.0"]
    assert restored(control=["spacetime"], presets={"spacetime": then})["spacetime.weight"] == 0.25
    absent = {"spacetime": ["spacetime.weight=none", "scheduler=none", "guidance_scale=7.5"]}
    assert restored("sd15", control=["spacetime"], presets=absent)["spacetime.weight"] == 0.5  # as for no value
