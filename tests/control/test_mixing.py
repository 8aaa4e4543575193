"""Texts of many regions: mixed in within the layer as by its processor, and only where their regions are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import PROMPT, assert_same_draw, draw, noise
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from localctl.control.attach import attach
from localctl.control.base import Control
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout, Region

BOXES = ((0, 0, 1, 1), (0, 0, 0.5, 0.5), (0.4, 0.4, 0.9, 1), (0.8, 0, 1, 0.2), (0.1, 0.1, 0.13, 0.13))
MANY = Layout(
    PROMPT,
    regions=tuple(
        Region(None, box, prompt=f"cat {index}", negative_prompt=f"x {index}", strength=0.3 + 0.1 * index)
        for index, box in enumerate(BOXES)
    ),
)
FEW = Layout("dogs x", regions=(Region("dogs", (0, 0, 1, 0.5), negative_prompt="a"),))


class Foreign(AttnProcessor2_0):
    """Called with other texts, since it might differ from the class that it extends."""


@pytest.mark.parametrize(
    "control",
    [NegativePrompts(), SpaceTimeAttention(weight=0.8), SpaceTimeAttention(mix="released", schedule="linear")],
    ids=["negatives", "convex", "released"],
)
def test_the_layer_mixes_as_its_processor_does(control: Control, sd_pipe: StableDiffusionPipeline) -> None:
    options: dict[str, Any] = {"latents": noise(2, (12, 20)), "height": 96, "width": 160, "guidance_scale": 5.0}
    prompts = [MANY.prompt, FEW.prompt]
    plain = draw(sd_pipe, prompts, **options)
    with attach(sd_pipe, [MANY, FEW], control):
        own = draw(sd_pipe, prompts, **options)
    sd_pipe.unet.set_attn_processor(Foreign())
    with attach(sd_pipe, [MANY, FEW], control):
        assert_same_draw(own, draw(sd_pipe, prompts, **options))
    assert min((own - plain).abs().amax(dim=(1, 2, 3))) > 1e-3


def test_only_the_cells_of_a_region_attend_to_its_text(
    sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [index / 4 for index in range(4)]
    layout = Layout(
        PROMPT,
        regions=tuple(Region(None, (x, y, x + 0.25, y + 0.25), negative_prompt="x") for x in sides for y in sides),
    )
    asked: list[int] = []
    attention = nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[2] != 77:  # the text encoder's
            asked.append(query.shape[0] * query.shape[2])
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    size: dict[str, Any] = {"latents": noise(1, (32, 32)), "height": 256, "width": 256, "num_inference_steps": 1}
    draw(sd_pipe, **size)
    plain, calls = sum(asked), len(asked)
    asked.clear()
    with attach(sd_pipe, layout, NegativePrompts()):
        draw(sd_pipe, **size)
    cross = calls // 2  # every block has a layer of either kind
    assert len(asked) == calls + cross  # all 16 regions at once
    assert sum(asked) == plain + plain // 4  # the regions cover one of two rows, in one of two kinds of layers


def test_keys_and_values_of_the_texts_are_projected_once_per_call(sd_pipe: StableDiffusionPipeline) -> None:
    ran: list[int] = []
    attn = sd_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.to_v.register_forward_hook(lambda module, args, output: ran.append(len(output)))
    for _ in range(2):
        with attach(sd_pipe, MANY, NegativePrompts()):
            for _ in range(2):
                ran.clear()
                draw(sd_pipe, num_inference_steps=3)
                assert ran == [2, len(BOXES), 2, 2]


def test_gradients_reach_weights_through_the_layer(sd_pipe: StableDiffusionPipeline) -> None:
    """They are those of the processor's own way."""

    def gradient() -> Tensor:
        weights = torch.full((2, len(BOXES)), 0.2).requires_grad_()
        with attach(sd_pipe, MANY, SpaceTimeAttention(weights=weights)), torch.enable_grad():
            sd_pipe.encode_prompt(PROMPT, "cpu", 1, True)
            sd_pipe.scheduler.set_timesteps(2)
            text = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(0))
            output = sd_pipe.unet(noise(2), sd_pipe.scheduler.timesteps[0], text).sample
            return torch.autograd.grad(output.square().sum(), weights)[0]

    own = gradient()
    sd_pipe.unet.set_attn_processor(Foreign())
    torch.testing.assert_close(own, gradient(), rtol=1e-3, atol=1e-5)
    assert own[0].abs().min() > 1e-6 and not own[1].any()
