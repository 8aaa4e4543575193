"""Region methods together with what else steers a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT, Watch, draw, processors, quiet
from conftest import TEXT_WIDTH, tiny_sd
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.attachment import attach
from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.control.local_adapter import LocalAdapterControl


def test_image_to_image_and_inpainting_count_their_own_steps(sd_pipe: StableDiffusionPipeline) -> None:
    components = {**sd_pipe.components, "requires_safety_checker": False}
    photo: dict[str, Any] = {"image": torch.rand(1, 3, 64, 64), "strength": 0.5, "num_inference_steps": 8}
    for kind, extra in (
        (StableDiffusionImg2ImgPipeline, {}),
        (StableDiffusionInpaintPipeline, {"mask_image": torch.ones(1, 1, 64, 64), "height": 64, "width": 64}),
    ):
        pipe = quiet(kind(**components))
        seen: list[tuple[int, int, float]] = []

        def redraw(pipe: Any = pipe, extra: Any = extra) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return pipe(PROMPT, **photo, **extra, output_type="latent", generator=generator).images

        plain = redraw()
        with attach(pipe, LAYOUT, [DenseModulation(rest="segment"), Watch(seen)]):
            assert (redraw() - plain).abs().max() > 1e-4
        assert [item[:2] for item in seen] == [(step, 4) for step in range(4)]
        times = sd_pipe.scheduler.timesteps[-4:]
        abar = sd_pipe.scheduler.alphas_cumprod[times]
        expected = ((1 - abar) / abar).sqrt().tolist()
        assert [item[2] for item in seen] == pytest.approx(expected, rel=1e-5)  # of the real steps, not from step 0


def controlnet_pipe(pipe: StableDiffusionPipeline, count: int) -> Any:
    nets = []
    for index in range(count):
        torch.manual_seed(index)
        net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3).eval().requires_grad_(False)
        for parameter in net.parameters():
            if not parameter.any():  # the zero convolutions, or it would change nothing
                parameter.normal_(std=0.1)
        nets.append(net)
    parts = {**pipe.components, "controlnet": nets if count > 1 else nets[0]}
    return quiet(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("count", [1, 2])
def test_with_controlnets_and_local_adapters(
    count: int, sd_pipe: StableDiffusionPipeline, make_adapter: Callable[..., LocalAdapter]
) -> None:
    pipe = controlnet_pipe(sd_pipe, count)
    image = torch.rand(1, 3, 64, 64)
    photo = {"image": [image] * count if count > 1 else image, "height": 64, "width": 64}
    adapters = [
        LocalAdapterControl(make_adapter(seed), torch.rand(1, 64, 64), torch.ones(1, 64, 64)) for seed in (1, 2)
    ]
    results = [draw(pipe, **photo), draw(sd_pipe)]
    stack: list[Control] = []
    for control in (METHODS["bias"](), METHODS["dense"](), *adapters):
        stack.append(control)
        with attach(pipe, LAYOUT, stack):
            results.append(draw(pipe, **photo))
    for index, one in enumerate(results):
        for other in results[:index]:
            assert (one - other).abs().max() > 1e-4  # everything that was added shows


def ip_pipe() -> Any:
    """A tiny pipeline with an IP-Adapter of random weights, loaded as diffusers loads one."""
    pipe = tiny_sd()
    torch.manual_seed(1)
    weights: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    width, tokens = TEXT_WIDTH, 4
    weights["image_proj"] = {
        "proj.weight": torch.randn(tokens * width, 8),
        "proj.bias": torch.randn(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    key = 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k_ip", "to_v_ip"):
                weights["ip_adapter"][f"{key}.{part}.weight"] = torch.randn(attn.to_k.out_features, width)
            key += 2
    pipe.unet._load_ip_adapter_weights([weights])
    pipe.set_ip_adapter_scale(1.0)
    pipe.unet.eval().requires_grad_(False)
    return pipe


@pytest.mark.parametrize("method", METHODS)
def test_with_an_ip_adapter_and_its_masks(method: str) -> None:
    pipe = ip_pipe()
    before = processors(pipe)
    torch.manual_seed(3)
    embeds = torch.randn(1, 2, 8)  # two pictures
    options: dict[str, Any] = {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 2, 8), embeds])]}
    left = torch.zeros(1, 2, 64, 64)
    left[:, 0, :, :32], left[:, 1, :, 32:] = 1, 1
    masked = {**options, "cross_attention_kwargs": {"ip_adapter_masks": [left]}}
    swapped = {**options, "cross_attention_kwargs": {"ip_adapter_masks": [left.flip(1)]}}
    plain = draw(pipe, **masked)
    with attach(pipe, LAYOUT, METHODS[method]()):
        steered = draw(pipe, **masked)
        assert (steered - plain).abs().max() > 1e-4
        assert (draw(pipe, **swapped) - steered).abs().max() > 1e-4
        assert (draw(pipe, **options) - steered).abs().max() > 1e-4
        pipe.set_ip_adapter_scale(0.0)
        assert (draw(pipe, **masked) - steered).abs().max() > 1e-4
        pipe.set_ip_adapter_scale(1.0)
        assert torch.equal(draw(pipe, **masked), steered)
    after = processors(pipe)
    assert all(after[name] is before[name] for name in before) and torch.equal(draw(pipe, **masked), plain)


def test_with_lora(sd_pipe: StableDiffusionPipeline) -> None:
    peft = pytest.importorskip("peft")
    plain = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        without = draw(sd_pipe)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    sd_pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    lora = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, [METHODS["bias"](), METHODS["dense"]()]):
        both = draw(sd_pipe)
    for one, other in ((lora, plain), (both, lora), (both, without)):
        assert (one - other).abs().max() > 1e-4
