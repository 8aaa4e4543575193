"""What a run had without being given is back on the tab Place, or its image is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localctl.studio.place_restore import values_of

SCENE_FILE = Path(__file__).parents[2] / "examples" / "scene.json"
RUN: dict[str, Any] = {"layout": [str(SCENE_FILE)], "control": ["spacetime"]}


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
        values_of({**RUN, **options}, base, (64, 64))


def test_an_image_of_other_presets_brings_them_back() -> None:
    then = ["spacetime.weight=0.25", "spacetime.mix=released", "scheduler=ddpm", "guidance_scale=4.0"]
    assert values_of({**RUN, "presets": {"spacetime": then}}, "micro", (64, 64))["spacetime.weight"] == 0.25
    absent = {"spacetime": ["spacetime.weight=none", "scheduler=none", "guidance_scale=7.5"]}
    assert values_of({**RUN, "presets": absent}, "sd15", (64, 64))["spacetime.weight"] == 0.5  # as for no value
