"""Region methods together with other ways to steer a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT, Watch, adapter_control, draw, processors, quiet
from composition_helpers import with_controlnets, with_ip_adapter, with_lora
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.base import Control
from localctl.control.dense import DenseModulation


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


@pytest.mark.parametrize("count", [1, 2])
def test_with_controlnets_and_local_adapters(
    count: int, sd_pipe: StableDiffusionPipeline, make_adapter: Callable[..., LocalAdapter]
) -> None:
    pipe, photo = with_controlnets(sd_pipe, count)
    adapters = [adapter_control(make_adapter(seed), seed=seed) for seed in (1, 2)]
    results = [draw(pipe, **photo), draw(sd_pipe)]
    stack: list[Control] = []
    for control in (METHODS["bias"](), METHODS["dense"](), *adapters):
        stack.append(control)
        with attach(pipe, LAYOUT, stack):
            results.append(draw(pipe, **photo))
    for index, one in enumerate(results):
        for other in results[:index]:
            assert (one - other).abs().max() > 1e-4  # everything that was added shows


@pytest.mark.parametrize("method", METHODS)
def test_with_an_ip_adapter_and_its_masks(method: str, sd_pipe: StableDiffusionPipeline) -> None:
    pipe, masked = with_ip_adapter(sd_pipe)
    before = processors(pipe)
    options = {"ip_adapter_image_embeds": masked["ip_adapter_image_embeds"]}
    masks = [mask.flip(1) for mask in masked["cross_attention_kwargs"]["ip_adapter_masks"]]
    swapped = {**options, "cross_attention_kwargs": {"ip_adapter_masks": masks}}
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
    pytest.importorskip("peft")
    plain = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        without = draw(sd_pipe)
    with_lora(sd_pipe)
    lora = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, [METHODS["bias"](), METHODS["dense"]()]):
        both = draw(sd_pipe)
    for one, other in ((lora, plain), (both, lora), (both, without)):
        assert (one - other).abs().max() > 1e-4
