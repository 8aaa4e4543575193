"""Presets as API; that the command line uses the same is tested with it (tests/cli/test_sample_regions.py)."""

from __future__ import annotations

from typing import Any

import pytest

import localctl
from localctl.bases import MICRO_WEIGHTS
from localctl.control.presets import BESIDE, CONTROLS, PRESETS


def test_controls_have_the_presets_of_their_base_and_company() -> None:
    bias, guidance = localctl.controls("bias+guidance", base="micro")
    presets = PRESETS["micro"]
    assert bias == localctl.RegionBias(**presets["bias"], **BESIDE["micro"]["bias", "guidance"])
    assert guidance == localctl.LayoutGuidance(**presets["guidance"])
    assert localctl.controls(["bias"], base=str(MICRO_WEIGHTS)) == [localctl.RegionBias(**presets["bias"])]
    assert (
        localctl.controls("bias", base="sd15")
        == localctl.controls("bias", base="owner/other")
        == [localctl.RegionBias()]
    )
    assert localctl.controls("none") == []
    changed = localctl.controls("bias+guidance", end=0.9, **{"bias.start": 0.7})
    assert [(item.start, item.end) for item in changed] == [(0.7, 0.9), (guidance.start, 0.9)]


def test_a_class_for_a_base() -> None:
    for name, kind in CONTROLS.items():
        assert [kind.for_base("micro")] == localctl.controls(name, base="micro")
    assert localctl.RegionBias.for_base("micro", strength=1.0) == localctl.RegionBias(
        **{**PRESETS["micro"]["bias"], "strength": 1.0}
    )
    assert localctl.NegativePrompts.for_base("micro", end=0.5) == localctl.NegativePrompts(end=0.5)


def test_they_act_where_the_embedded_base_settles_a_layout() -> None:
    for name in CONTROLS:
        assert localctl.controls(name, base="micro")[0].end >= 0.7, "the first third of its steps is noise"


def test_how_to_sample_with_them() -> None:
    own = localctl.Sampling(scheduler="ddpm", guidance_scale=4.0)
    for names in ("guidance+bias", "bias+dense", ["bias", "forward"]):
        assert localctl.sampling_of(names, base="micro") == own
    for names, base in (("none", "micro"), ("guidance", "micro"), ("guidance+forward", "micro"), ("bias", "sd15")):
        assert localctl.sampling_of(names, base) == localctl.Sampling()
    assert localctl.sampling_of("spacetime_optimized") == localctl.Sampling(guidance_scale=4.0)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ("dence", {}, "Unknown control 'dence'; choose among bias, dense, .* and none"),
        ("bias+bias", {}, "bias bias cannot be combined"),
        ("bias+none", {}, "cannot be combined"),
        ("guidance+spacetime_optimized", {}, "use spacetime with guidance"),
        ("bias", {"strenght": 1}, "has a setting 'strenght'; choose among end, hide_phrases"),
        ("bias", {"dense.decay": 1}, "has a setting 'dense.decay'"),
        ("none", {"strength": 1}, "there is no control to set"),
        ("bias", {"strength": float("nan")}, "finite number"),
    ],
)
def test_what_does_not_go_together_is_named(names: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        localctl.controls(names, base="micro", **settings)
