"""diffusers' ways to save memory: weights stored in fewer bits, or away from the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, draw
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading

from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.control.forward_guidance import ForwardGuidance
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention

CPU = torch.device("cpu")
WAYS: dict[str, Callable[[Any], None]] = {
    "float8": lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "bfloat16": lambda pipe: pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "leaves": lambda pipe: pipe.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "blocks": lambda pipe: apply_group_offloading(pipe.unet, CPU, CPU, "block_level", 1),
    "both": lambda pipe: (WAYS["float8"](pipe), WAYS["leaves"](pipe)),
}
NOTHING = (
    RegionBias(strength=0.0),
    DenseModulation(w_cross=0.0, w_self=0.0),
    SpaceTimeAttention(weight=0.0),
    ForwardGuidance(strength=0.0),
    AttentionMaps(),
)


@pytest.mark.parametrize("way", WAYS)
def test_controls_act_and_without_strength_they_do_not(way: str, sd_pipe: StableDiffusionPipeline) -> None:
    WAYS[way](sd_pipe)
    plain = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, NOTHING):
        assert torch.equal(draw(sd_pipe), plain)
    controls: list[Control] = [make() for make in METHODS.values()]
    if way in ("leaves", "blocks"):  # weights in fewer bits let no gradients pass
        controls.append(LayoutGuidance(end=1.0, threshold=0.0))
    for control in controls:
        with attach(sd_pipe, LAYOUT, control):
            steered = draw(sd_pipe)
        assert bool(steered.isfinite().all()) and (steered - plain).abs().max() > 1e-3
    assert torch.equal(draw(sd_pipe), plain)


@pytest.mark.parametrize("way", ["leaves", "blocks"])
def test_offloading_changes_no_image(way: str, sd_pipe: StableDiffusionPipeline) -> None:
    expected = {}
    for name, make in METHODS.items():
        with attach(sd_pipe, LAYOUT, make()):
            expected[name] = draw(sd_pipe)
    WAYS[way](sd_pipe)
    for name, make in METHODS.items():
        with attach(sd_pipe, LAYOUT, make()):
            assert torch.equal(draw(sd_pipe), expected[name])
