"""Texts of regions: negative prompts per region, and phrases encoded alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, PROMPT, assert_same_draw, draw, in_double, noise
from diffusers import StableDiffusionPipeline
from torch import Tensor

from localctl.control.attach import attach
from localctl.control.dense import DenseModulation
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.region_bias import RegionBias
from localctl.control.regions import without_phrases
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout, Region
from localctl.sampling import generate


def test_a_regions_negative_prompt_rules_inside_it(sd_pipe: StableDiffusionPipeline) -> None:
    start = noise(1).double()
    in_double(sd_pipe)

    def negative(text: str | None, box: Any = (0, 0, 1, 1), call: str = "xx", **options: Any) -> Tensor:
        layout = Layout(PROMPT, regions=(Region("cat", box, negative_prompt=text, **options),))
        with attach(sd_pipe, layout, NegativePrompts()):
            return draw(sd_pipe, negative_prompt=call, latents=start)

    plain, other = (draw(sd_pipe, negative_prompt=text, latents=start) for text in ("xx", "boats"))
    assert torch.equal(negative(None), plain)
    assert torch.equal(negative("boats", start=0.6, end=0.7), plain)  # neither of the two steps
    assert_same_draw(negative("boats"), other)
    half = negative("boats", (0, 0, 0.5, 1))
    assert min((half - plain).abs().max(), (half - other).abs().max()) > 1e-4
    with attach(sd_pipe, LAYOUT, NegativePrompts()):
        options = {"guidance_scale": 1.0, "latents": start}
        assert torch.equal(draw(sd_pipe, **options), draw(sd_pipe, **options))


def test_a_regions_negative_prompt_is_refused_without_guidance(sd_pipe: StableDiffusionPipeline) -> None:
    layout = Layout(PROMPT, regions=(Region("cat", (0, 0, 1, 1), negative_prompt="boats"),))
    message = "NegativePrompts changes the negative prompt, but this call with the U-Net has none"
    with pytest.raises(ValueError, match=message), attach(sd_pipe, layout, NegativePrompts()):
        draw(sd_pipe, guidance_scale=1.0)


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


def test_prompts_without_their_phrases() -> None:
    def left(prompt: str, *regions: Region) -> str:
        return without_phrases(Layout(prompt, regions=regions))

    box = (0, 0, 1, 1)
    assert left("a red circle, and two  red circles", Region("red circle", box)) == "a , and two red circles"
    assert left("a cat and a cat", Region("cat", box, occurrence=1), Region(None, box)) == "a cat and a"
    assert left("cat", Region("cat", box)) == "" and left("a b") == "a b"


@pytest.mark.parametrize("control", [RegionBias(hide_phrases=True), DenseModulation(hide_phrases=True)])
@pytest.mark.parametrize("kind", ["sd_pipe", "sdxl_pipe"])
def test_hidden_phrases_are_in_their_own_tokens_alone(kind: str, control: Any, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)
    seen: list[Tensor] = []
    draw(pipe)
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    plain, negative = pipe.encode_prompt(PROMPT, **options)[:2]
    rest = pipe.encode_prompt(without_phrases(LAYOUT), **options)[0][0]
    if isinstance(control, DenseModulation):
        control = replace(control, separate_texts=False, end=0.5)
    else:
        control = replace(control, end=0.5)
    with attach(pipe, LAYOUT, [control, RegionBias(hide_phrases=True, end=0.5)]):
        hook = pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        draw(pipe)
        hook.remove()
    expected = rest.clone()
    expected[2:5], expected[6:10] = plain[0, 2:5], plain[0, 6:10]
    active, passive = seen  # the window ends before the second step
    torch.testing.assert_close(active[0], negative[0])
    torch.testing.assert_close(active[1], expected)
    assert (expected - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(passive[1], plain[0])


def test_hiding_without_strength_changes_nothing(sd_pipe: StableDiffusionPipeline) -> None:
    plain = draw(sd_pipe)
    for control in (
        RegionBias(strength=0.0, hide_phrases=True),
        DenseModulation(w_cross=0.0, w_self=0.0, hide_phrases=True),
        RegionBias(start=0.6, end=0.7, hide_phrases=True),  # neither of the two steps
    ):
        with attach(sd_pipe, LAYOUT, control):
            assert torch.equal(draw(sd_pipe), plain)
    with attach(sd_pipe, LAYOUT, RegionBias(strength=1e-9, hide_phrases=True)):
        assert (draw(sd_pipe) - plain).abs().max() > 1e-4
    with attach(sd_pipe, PROMPT, RegionBias(hide_phrases=True)):
        assert torch.equal(draw(sd_pipe), plain)


def test_phrases_are_hidden_row_by_row(sd_pipe: StableDiffusionPipeline) -> None:
    off = replace(LAYOUT, regions=tuple(replace(region, strength=0.0) for region in LAYOUT.regions))
    rows = [PROMPT, LAYOUT, replace(LAYOUT, regions=LAYOUT.regions[:1]), off]
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    plain = generate(sd_pipe, PROMPT, (), 3, **options).images[0]
    for control in (
        RegionBias(hide_phrases=True),
        DenseModulation(hide_phrases=True),
        SpaceTimeAttention(hide_phrases=True),
    ):
        together = generate(sd_pipe, rows, control, 3, **options).images
        for row, image in zip(rows, together, strict=True):
            assert_same_draw(generate(sd_pipe, row, control, 3, **options).images[0], image)
        assert_same_draw(together[0], plain)
        assert_same_draw(together[3], plain)
        assert min((together[i] - together[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_space_time_attention_hides_the_phrases_themselves(sd_pipe: StableDiffusionPipeline) -> None:
    """With no weight outside, the objects are encoded in the regions only."""
    rest = replace(LAYOUT, prompt=without_phrases(LAYOUT), regions=())
    seen: list[Tensor] = []
    with attach(sd_pipe, LAYOUT, SpaceTimeAttention(hide_phrases=True, end=0.5)):
        hook = sd_pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        draw(sd_pipe)
        hook.remove()
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    texts = [sd_pipe.encode_prompt(text, **options)[0][0] for text in (rest.prompt, PROMPT)]
    for text, expected in zip(seen, texts, strict=True):
        torch.testing.assert_close(text[1], expected)
