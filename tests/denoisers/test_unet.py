"""The U-Net behind the protocol: its groups of layers, its calls, and nobody else who looks inside."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

import localctl
from localctl.control import attention, base
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import AttentionLayer, BlockResiduals, DenoiserInputs

INSIDE = re.compile(r"down_blocks|mid_block|up_blocks|is_cross_attention|pipe\.unet")
HOLDERS = ("pipelines.py", "training", "addons")  # they may hold the U-Net as a module


def test_only_the_families_look_inside() -> None:
    package = Path(localctl.__file__).parent
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0]
        if room not in ("denoisers", *HOLDERS):
            assert not [line for line in path.read_text("utf-8").splitlines() if INSIDE.search(line)], path


def test_layers_are_chosen_by_part_and_grid(
    sd_pipe: StableDiffusionPipeline, sdxl_pipe: StableDiffusionXLPipeline
) -> None:
    for pipe in (sd_pipe, sdxl_pipe):
        denoiser = denoiser_of(pipe)
        layers = [layer for layer, _ in denoiser.attention_layers((64, 64)) if layer.cross]
        assert denoiser.choose_layers(("down", "mid", "up")) == tuple(layer.name for layer in layers)
        default = denoiser.choose_layers(None)
        assert any(name.startswith("mid_block") for name in default)
        for layer in layers:
            group = f"{layer.name.partition('_')[0]}/{64 // layer.size[0]}"
            assert layer.name in denoiser.choose_layers([group])
        with pytest.raises(ValueError, match=r"The U-Net has no cross-attention at 'side'; choose among down/"):
            denoiser.choose_layers(["side"])


@pytest.mark.parametrize("by_position", range(4))
def test_what_is_written_is_read(by_position: int, sd_pipe: StableDiffusionPipeline) -> None:
    """Whether arguments come by position or by name; those given are left alone."""
    denoiser = denoiser_of(sd_pipe)
    names = ("sample", "timestep", "encoder_hidden_states")
    values: list[Any] = [torch.zeros(2, 4, 8, 8), 5, torch.zeros(2, 7, 16)]
    args, kwargs = tuple(values[:by_position]), dict(zip(names[by_position:], values[by_position:], strict=True))
    skips = BlockResiduals([torch.ones(1)], torch.ones(1))
    changed = denoiser.write((args, kwargs), latents=values[0] + 1, text=values[2] + 2)
    changed = denoiser.write(changed, residuals=[torch.ones(1)], skips=skips)
    changed = denoiser.write(changed, residuals=[torch.ones(1)], skips=skips)
    found = denoiser.read(*changed)
    assert bool((found.sample == 1).all()) and bool((found.text == 2).all()) and found.timestep == 5
    assert len(changed[0]) == by_position
    assert [changed[1]["down_intrablock_additional_residuals"], changed[1]["down_block_additional_residuals"]] == [
        [2]
    ] * 2
    assert changed[1]["mid_block_additional_residual"] == 2
    assert len(args) == by_position and len(kwargs) == 3 - by_position and not values[0].any()
    with pytest.raises(TypeError, match="'residual' is no change of a call's arguments; known are latents, text, res"):
        denoiser.write((args, kwargs), **dict[str, Any](residual=[torch.ones(1)]))


def test_pipelines_of_no_known_family_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SimpleNamespace has no unet, and a transformer \(Identity\) not known"):
        denoiser_of(SimpleNamespace(transformer=torch.nn.Identity()))


def test_names_of_before_warn() -> None:
    for module, name, now in (
        (attention, "Site", AttentionLayer),
        (base, "UNetInputs", DenoiserInputs),
        (base, "RunUNet", base.RunDenoiser),
    ):
        with pytest.warns(DeprecationWarning, match=rf"{name} is now localctl\..*\.{now.__name__}"):
            assert getattr(module, name) is now
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        base.Nothing  # noqa: B018
