"""Texts of regions: their own negative prompts, and phrases encoded alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, PROMPT, draw
from diffusers import StableDiffusionPipeline
from torch import Tensor

from localctl.attachment import attach
from localctl.control.dense import DenseModulation
from localctl.control.negative_prompts import NegativePrompts
from localctl.layout import Layout, Region


def test_a_regions_negative_prompt_rules_inside_it(sd_pipe: StableDiffusionPipeline) -> None:
    def negative(text: str | None, box: Any = (0, 0, 1, 1), call: str = "xx", **options: Any) -> Tensor:
        layout = Layout(PROMPT, regions=(Region("cat", box, negative_prompt=text, **options),))
        with attach(sd_pipe, layout, NegativePrompts()):
            return draw(sd_pipe, negative_prompt=call)

    plain, other = draw(sd_pipe, negative_prompt="xx"), draw(sd_pipe, negative_prompt="boats")
    assert torch.equal(negative(None), plain)
    assert torch.equal(negative("boats", start=0.6, end=0.7), plain)  # neither of the two steps
    torch.testing.assert_close(negative("boats"), other, rtol=0, atol=1e-5)
    half = negative("boats", (0, 0, 0.5, 1))
    assert min((half - plain).abs().max(), (half - other).abs().max()) > 1e-4
    with attach(sd_pipe, LAYOUT, NegativePrompts()):
        assert torch.equal(draw(sd_pipe, guidance_scale=1.0), draw(sd_pipe, guidance_scale=1.0))


@pytest.mark.parametrize("kind", ["sd_pipe", "sdxl_pipe"])
def test_phrases_are_encoded_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """The tokens of each phrase carry the phrase's own embedding; the rest and the negative rows stay."""
    pipe = request.getfixturevalue(kind)
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["encoder_hidden_states"])

    draw(pipe)  # a call of the pipeline sets what encode_prompt relies on
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    plain, negative = pipe.encode_prompt(PROMPT, **options)[:2]
    cat, dogs = (pipe.encode_prompt(text, **options)[0][0] for text in ("cat", "dogs"))
    with attach(pipe, LAYOUT, DenseModulation()):
        hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
        draw(pipe)
        hook.remove()
    expected = plain[0].clone()
    expected[2:5], expected[6:10] = cat[1:4], dogs[1:5]  # "a", "cat", ",", "dogs", one token per letter
    assert len(seen) == 2
    for text in seen:
        torch.testing.assert_close(text[0], negative[0])
        torch.testing.assert_close(text[1], expected)
