"""Controls as JSON: every public control is restored with its settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline

import localctl
from localctl.adapter import LocalAdapter

IMAGES = {"condition": torch.rand(1, 64, 64), "mask": torch.ones(1, 64, 64)}
CHANGES: dict[str, dict[str, Any]] = {
    "AttentionMaps": {"sites": ("mid/8", "up/4")},
    "DenseModulation": {"memory_limit": math.inf, "rest": "free"},
    "ForwardGuidance": {"strength": 0.3},
    "LayoutGuidance": {"sites": ("mid/4",), "recheck": False},
    "NegativePrompts": {"end": 0.5},
    "OptimizedSpaceTime": {"epochs": 7},
    "RegionBias": {"strength": 1 / 3, "hide_phrases": True},
    "SpaceTimeAttention": {"template": "a {}"},
}


def all_controls() -> set[str]:
    classes = {name: getattr(localctl, name) for name in localctl.__all__}
    return {name for name, item in classes.items() if isinstance(item, type) and hasattr(item, "from_json")}


def test_no_public_control_is_forgotten() -> None:
    assert all_controls() - {"Control"} == {*CHANGES, "IPAdapterControl", "LocalAdapterControl", "MaskedControlNet"}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_come_back(name: str, tmp_path: Path) -> None:
    kind = getattr(localctl, name)
    control = kind(**CHANGES[name])
    path = control.save(tmp_path / "control.json")
    for found in (localctl.load_control(path), kind.from_json(control.to_json())):
        assert type(found) is kind and found.to_json() == control.to_json() != kind().to_json()
        assert all(getattr(found, field) == value for field, value in CHANGES[name].items())


def test_weights_come_back_bit_for_bit() -> None:
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    for given in (weights, (weights, weights[:, :1])):
        control = localctl.SpaceTimeAttention(weights=given)
        found = localctl.SpaceTimeAttention.from_json(control.to_json()).weights
        pairs = zip(found, given, strict=True) if isinstance(given, tuple) else [(found, given)]  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in pairs)  # type: ignore[call-overload]


def test_an_adapter_is_saved_by_its_place(make_adapter: Callable[..., LocalAdapter], tmp_path: Path) -> None:
    adapter = make_adapter()
    with pytest.raises(ValueError, match="adapter was not loaded from a folder or hub id, .* call its save_pretrained"):
        localctl.LocalAdapterControl(adapter, **IMAGES).to_json()
    adapter.save_pretrained(tmp_path / "adapter")
    adapter = LocalAdapter.from_pretrained(tmp_path / "adapter")
    control = localctl.LocalAdapterControl(adapter, **IMAGES, weight=[1, 0, 0.5, 2], start=0.1)
    path = control.save(tmp_path / "control.json")
    with pytest.raises(ValueError, match="without its images; give condition= and mask="):
        localctl.load_control(path)
    found = localctl.load_control(path, **IMAGES)
    assert found.weight == (1, 0, 0.5, 2) and found.start == 0.1
    assert torch.equal(found.condition, control.condition) and torch.equal(found.mask, control.mask)
    pairs = zip(found.adapter.parameters(), adapter.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_controlnet_is_saved_by_its_place(sd_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    ControlNetModel.from_unet(sd_pipe.unet).save_pretrained(tmp_path / "net")
    net = ControlNetModel.from_pretrained(tmp_path / "net")
    path = localctl.MaskedControlNet(net, **IMAGES, guess_mode=True).save(tmp_path / "control.json")
    found = localctl.load_control(path, **IMAGES)
    assert found.guess_mode and torch.equal(found.controlnet.conv_in.weight, net.conv_in.weight)
    (tmp_path / "net" / "config.json").unlink()
    with pytest.raises(ValueError, match="ControlNet .* cannot be loaded"):
        localctl.load_control(path, **IMAGES)


def test_image_prompts_are_given_anew(tmp_path: Path) -> None:
    prompts = [localctl.ImagePrompt(torch.zeros(3, 8, 8), torch.ones(1, 8, 8))]
    path = localctl.IPAdapterControl(prompts, mask_resize="nearest").save(tmp_path / "control.json")
    with pytest.raises(ValueError, match="without its images; give prompts="):
        localctl.load_control(path)
    found = localctl.load_control(path, prompts=prompts)
    assert found.mask_resize == "nearest" and found.prompts == tuple(prompts)


def test_a_list_of_controls(tmp_path: Path) -> None:
    controls = localctl.controls("bias+dense+guidance+forward+spacetime", base="micro")
    path = localctl.save_controls(controls, tmp_path / "controls.json")
    assert localctl.load_controls(path) == controls
    assert [control.end for control in localctl.load_controls(path, end=0.9)] == [0.9] * 5
    with pytest.raises(ValueError, match="None of the controls has a setting 'mask'"):
        localctl.load_controls(path, mask=torch.ones(1, 8, 8))
    controls[0].save(path)
    assert localctl.load_controls(path) == controls[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "does not describe a control"),
        ("{}", "does not describe a control"),
        ('{"control": "train"}', "names 'train', which is not a known control"),
        ('{"control": "Layout"}', "names 'Layout', which is not a known control"),
        ('{"control": "Control"}', "names 'Control', which is not a known control"),
        ('{"control": "RegionBias", "strenght": 1}', "no setting 'strenght'; did you mean 'strength'"),
        ('{"control": "RegionBias", "strength": "x"}', "finite number, not 'x'"),
        ('{"control": "RegionBias", "start": "x"}', "does not describe a valid RegionBias"),
        ('{"control": "NegativePrompts"}', "describes a NegativePrompts, not a RegionBias"),
    ],
)
def test_what_is_no_control_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        localctl.RegionBias.from_json(text)
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        localctl.load_control(tmp_path / "none.json")
