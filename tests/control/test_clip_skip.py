"""``clip_skip``: the text encoder's layers before the last, whatever diffusers and transformers call its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from localctl.control.attach import attach
from localctl.control.dense import DenseModulation
from localctl.control.spacetime import SpaceTimeAttention
from localctl.sampling import generate

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


def embedded(pipe: StableDiffusionPipeline, text: str, skip: int) -> torch.Tensor:
    """Encode the text as a pipeline must with this ``clip_skip``."""
    ids = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    return pipe.text_encoder.final_layer_norm(states[-(skip + 1)])


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_layers_are_skipped(skip: int, sd_pipe: StableDiffusionPipeline) -> None:
    seen: list[torch.Tensor] = []
    hook = sd_pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    plain = generate(sd_pipe, PROMPT, (), 1, **OPTIONS).images[0]
    skipped = generate(sd_pipe, PROMPT, (), 1, clip_skip=skip, **OPTIONS).images[0]
    hook.remove()
    torch.testing.assert_close(seen[-1][1:], embedded(sd_pipe, PROMPT, skip))
    assert torch.equal(skipped, plain) == (skip == 0)
    assert not hasattr(sd_pipe.text_encoder, "text_model") and torch.equal(
        generate(sd_pipe, PROMPT, (), 1, **OPTIONS).images[0], plain
    )


def test_controls_encode_their_own_texts_alike(
    sd_pipe: StableDiffusionPipeline, sdxl_pipe: StableDiffusionXLPipeline
) -> None:
    controls = (METHODS["bias"](), DenseModulation(hide_phrases=True), SpaceTimeAttention())
    for pipe in (sd_pipe, sdxl_pipe):
        for control in controls:
            plain = generate(pipe, LAYOUT, control, 1, **OPTIONS).images[0]
            skipped = generate(pipe, LAYOUT, control, 1, clip_skip=1, **OPTIONS).images[0]
            assert skipped.isfinite().all() and (skipped - plain).abs().max() > 1e-4
        with attach(pipe, LAYOUT, controls[0]):
            pipe(LAYOUT.prompt, clip_skip=1, **OPTIONS)


@pytest.mark.parametrize(("fixture", "skip", "most"), [("sd_pipe", 3, 2), ("sdxl_pipe", 2, 1)])
def test_layers_that_there_are_not(fixture: str, skip: int, most: int, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(fixture)
    with pytest.raises(ValueError, match=f"clip_skip is a whole number from 0 to {most} with this base, not {skip}"):
        generate(pipe, PROMPT, (), 1, clip_skip=skip, **OPTIONS)
    assert generate(pipe, PROMPT, (), 1, clip_skip=most, **OPTIONS).images[0].isfinite().all()


def test_the_text_encoder_is_put_back_after_an_error(sd_pipe: StableDiffusionPipeline) -> None:
    before = set(vars(sd_pipe.text_encoder))
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()), pytest.raises(ValueError, match="call it with layout.prompt"):
        sd_pipe("another prompt", clip_skip=1, **OPTIONS)
    assert set(vars(sd_pipe.text_encoder)) == before
