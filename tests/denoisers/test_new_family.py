"""A new family needs one class: a network that packs its latents and names its arguments otherwise is steered alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, adapter_control, draw
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from localctl import denoisers
from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.layout_guidance import LayoutGuidance
from localctl.denoisers.base import Arguments, AttentionLayer, DenoiserInputs
from localctl.denoisers.unet import UNet


class Packed(nn.Module):
    """Takes latents as rows of cells (R, h * w, c), as transformers do, and computes what the U-Net inside does."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.net = unet

    @property
    def dtype(self) -> torch.dtype:
        return self.net.dtype

    def forward(self, hidden_states: Tensor, grid: tuple[int, int], time: Any, words: Tensor, **more: Any) -> Tensor:
        return self.net(unpacked(hidden_states, grid), time, words, return_dict=False, **more)[0]


def unpacked(hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
    return hidden_states.mT.unflatten(2, grid).contiguous()


class PackedPipeline(StableDiffusionPipeline):
    """The stock pipeline around a packed network; it has no U-Net of its own."""

    transformer: Packed

    def __getattribute__(self, name: str) -> Any:
        if name != "unet":
            return super().__getattribute__(name)
        return _Call(self.transformer)


class _Call:
    def __init__(self, transformer: Packed) -> None:
        self.transformer = transformer
        self.config = transformer.net.config

    def __call__(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        size = tuple(sample.shape[-2:])
        return (self.transformer(sample.flatten(2).mT, size, timestep, words=encoder_hidden_states),)


class PackedFamily(UNet):
    name = "transformer"
    attribute = "transformer"

    def __init__(self, module: Any, pipe: Any = None) -> None:
        super().__init__(module, pipe)
        self.inner = UNet(module.net, pipe)

    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Any]]:
        return self.inner.attention_layers(latent_size)

    def residual_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        return self.inner.residual_shapes(latent_size)

    def is_block(self, module: nn.Module, name: str) -> bool:
        return self.inner.is_block(module, name.removeprefix("net."))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        sample, grid, time = args
        return DenoiserInputs(sample, unpacked(sample, grid), time, kwargs["words"], {})

    def write(self, arguments: Arguments, *, latents: Any = None, text: Any = None, **residuals: Any) -> Arguments:
        (sample, *rest), kwargs = arguments
        _, kwargs = super().write(((), kwargs), **residuals)
        sample = sample if latents is None else latents.to(sample.dtype).flatten(2).mT
        return (sample, *rest), kwargs if text is None else {**kwargs, "words": text}


CONTROLS: dict[str, Callable[[], Any]] = {
    **METHODS,
    "guidance": lambda: LayoutGuidance(end=1.0, threshold=0.0),
}


@pytest.mark.parametrize("kind", [*CONTROLS, "adapter"])
def test_another_family_is_steered_alike(
    kind: str,
    sd_pipe: StableDiffusionPipeline,
    make_adapter: Callable[..., LocalAdapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control = adapter_control(make_adapter()) if kind == "adapter" else CONTROLS[kind]()

    def both(pipe: Any) -> tuple[Tensor, Sequence[float]]:
        maps = AttentionMaps()
        with attach(pipe, LAYOUT, [control, maps]):
            latents = draw(pipe)
        return latents, [maps.mass(0, region) for region in range(2)]

    plain, expected = draw(sd_pipe), both(sd_pipe)
    assert (expected[0] - plain).abs().max() > 1e-4
    monkeypatch.setattr(denoisers, "FAMILIES", (PackedFamily, UNet))
    pipe = PackedPipeline(**sd_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.__dict__["transformer"] = Packed(sd_pipe.unet)
    found = both(pipe)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
