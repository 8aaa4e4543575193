"""Weights in prompts and prompts of any length, on tiny real pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import localctl.prompt_weights as module
from localctl import (
    AttentionMaps,
    Control,
    DenseModulation,
    Layout,
    LayoutGuidance,
    Region,
    RegionBias,
    SpaceTimeAttention,
    attach,
    generate,
)
from localctl.control.methods import skipping_layers
from localctl.pipelines import encode_prompts
from localctl.prompt_weights import weighted_prompts
from localctl.tokens import positions_of

pytest.importorskip("compel")

PROMPT = "a cat on a mat"
LONG = "word " * 24  # 96 tokens of single letters


def encode(pipe: Any, prompts: str | list[str] | None, **options: Any) -> tuple[Tensor, ...]:
    """The embeddings as the pipeline's call gets them, with weights."""
    with weighted_prompts(pipe):
        return plain(pipe, prompts, **options)


def plain(pipe: Any, prompts: str | list[str] | None, **options: Any) -> tuple[Tensor, ...]:
    with skipping_layers(pipe, options.get("clip_skip")):
        found = pipe.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **options
        )
    return tuple(found)


@pytest.fixture(params=["sd_pipe", "sdxl_pipe"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_texts_without_weights_keep_their_bits(pipe: Any) -> None:
    assert same(encode(pipe, PROMPT), plain(pipe, PROMPT))
    assert same(encode(pipe, "(a cat:1) on a mat"), plain(pipe, PROMPT))
    assert same(encode(pipe, [PROMPT, r"\(a\)"], clip_skip=1), plain(pipe, [PROMPT, "(a)"], clip_skip=1))


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_compel_encodes_weights_of_one_bit_for_bit_as_the_pipeline(pipe: Any, clip_skip: int | None) -> None:
    """One weighted text sends all texts of the call to compel."""
    weighted = encode(pipe, [PROMPT, "(a cat:1.5) on a mat"], negative_prompt="a dog", clip_skip=clip_skip)
    expected = plain(pipe, [PROMPT, PROMPT], negative_prompt=["a dog"] * 2, clip_skip=clip_skip)
    assert torch.equal(weighted[0][0], expected[0][0]) and not torch.allclose(weighted[0][1], expected[0][1])
    assert same(weighted[1:], expected[1:])  # negative and pooled


def test_a_weight_changes_its_own_tokens_alone(sd_pipe: Any) -> None:
    """Each embedding of the weighted words is drawn away from that of the empty text."""
    before, empty = plain(sd_pipe, PROMPT, negative_prompt="")[:2]
    after = encode(sd_pipe, "a (cat:1.5) on a mat")[0]
    own = [2, 3, 4]  # after the start token and "a"
    others = [index for index in range(77) if index not in own]
    assert torch.equal(after[:, others], before[:, others])
    assert torch.allclose(after[:, own], (empty + 1.5 * (before - empty))[:, own], atol=1e-5)
    less = encode(sd_pipe, "a (cat:0.01) on a mat")[0]
    assert (less - before).abs().max() > 1e-3


def test_negative_embeddings_of_the_caller_are_kept(pipe: Any) -> None:
    _, negative, *pooled = plain(pipe, PROMPT, negative_prompt="a dog")
    own = {"negative_prompt_embeds": negative, **({"negative_pooled_prompt_embeds": pooled[1]} if pooled else {})}
    weighted = encode(pipe, "a (cat:1.5) on a mat", **own)
    assert same(weighted, encode(pipe, "a (cat:1.5) on a mat", negative_prompt="a dog"))
    with pytest.raises(ValueError, match="have 77 tokens and the prompt has 154; give a negative_prompt as text"):
        encode(pipe, LONG, **own)


def test_weights_beside_prompt_embeddings_are_refused(sd_pipe: Any) -> None:
    embeds = plain(sd_pipe, PROMPT)[0]
    assert same(
        encode(sd_pipe, None, prompt_embeds=embeds, negative_prompt=r"\(a\)"),
        plain(sd_pipe, PROMPT, negative_prompt="(a)"),
    )
    with pytest.raises(ValueError, match="need a prompt that is text"):
        encode(sd_pipe, None, prompt_embeds=embeds, negative_prompt="(a dog:1.5)")


def test_long_prompts_are_read_in_parts(pipe: Any) -> None:
    whole, negative, *pooled = encode(pipe, LONG)
    cut = plain(pipe, LONG)
    assert whole.shape[1] == negative.shape[1] == 154
    assert torch.equal(whole[:, :72], cut[0][:, :72])  # up to the end of a word
    assert all(torch.equal(a, b) for a, b in zip(pooled, cut[2:], strict=True))
    if pooled:
        assert not negative.any()  # SDXL's negative prompt is zeros by default
    else:
        assert torch.equal(negative[:, 77:], negative[:, :77])


def test_other_tools_syntax_is_refused(sd_pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"has '<lora:x:1>', syntax of other tools; load a LoRA by --lora"):
        generate(sd_pipe, "a cat <lora:x:1>", num_inference_steps=1)
    with pytest.raises(ValueError, match="has a weight of 99; give weights from 0 to 10"):
        generate(sd_pipe, "a (cat:99)", num_inference_steps=1)
    generate(sd_pipe, "a cat <lora:x:1>", num_inference_steps=1, prompt_weighting=False)
    assert "encode_prompt" not in vars(sd_pipe)


def test_without_compel_weights_are_refused_and_cut_prompts_are_said(
    sd_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_compel", lambda: False)
    monkeypatch.setattr("localctl.tokens.has_compel", lambda: False)
    with pytest.raises(
        ValueError, match=r"pip install 'localctl\[compel\]', or read them as text with prompt_weighting"
    ):
        encode(sd_pipe, "(a cat:1.5)")
    with pytest.warns(UserWarning, match="cut off, as the text encoder reads 77 tokens at once"):
        assert encode(sd_pipe, LONG)[0].shape[1] == 77
    with weighted_prompts(sd_pipe), pytest.raises(ValueError, match="comes after the first 77 tokens"):
        positions_of(sd_pipe, Layout(LONG + "cat", regions=(Region("cat", (0, 0, 0.5, 1)),)))


@pytest.mark.parametrize(
    "prompt", ["a (red ((cat)):1.2) on [a mat]", LONG + "a red cat. on a mat", "a red c(at:0.5) on a mat"]
)
def test_phrases_are_found_at_their_tokens(pipe: Any, prompt: str) -> None:
    """The columns of the phrase are those that change with the phrase's letters, up to what follows."""
    layout = Layout(prompt, regions=(Region("red cat", (0, 0, 0.5, 1)), Region("mat", (0.5, 0, 1, 1))))
    with weighted_prompts(pipe):
        cat, mat = positions_of(pipe, layout)
        embeds = encode_prompts(pipe, prompt)[0].states
        other = encode_prompts(pipe, prompt.replace("red", "rex"))[0].states
    assert len(cat) == 6 and len(mat) == 3 and mat[0] - cat[5] == (5 if "cat." in prompt else 4)
    changed = (embeds - other).abs().amax(dim=(0, 2)).nonzero().flatten()
    assert int(changed[0]) == cat[2]  # "r" and "e" are the same; text encoders are causal


def test_weights_off_read_marks_as_text(sd_pipe: Any) -> None:
    layout = Layout("(cat:1.5) on a mat", regions=(Region("mat", (0.5, 0, 1, 1)),))
    text = generate(sd_pipe, layout, num_inference_steps=2, output_type="latent", prompt_weighting=False).images[0]
    expected = sd_pipe(
        layout.prompt, num_inference_steps=2, output_type="latent", height=64, width=64, guidance_scale=7.5,
        latents=_noise(sd_pipe),
    ).images[0]  # fmt: skip
    assert torch.equal(text, expected)
    with attach(sd_pipe, layout, [], prompt_weighting=False), pytest.raises(ValueError, match="outer attach"):
        generate(sd_pipe, layout, prompt_weighting=True)


def _noise(pipe: Any) -> Tensor:
    from localctl.sampling import initial_noise

    return initial_noise(pipe, 0, 64, 64)


CONTROLS = [
    RegionBias(strength=1.0, hide_phrases=True),
    DenseModulation(w_cross=1.0, w_self=1.0, end=1.0, hide_phrases=True),
    LayoutGuidance(scale=1.0, iterations=1, threshold=0.0, end=1.0),
    SpaceTimeAttention(),
    AttentionMaps(),
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: type(control).__name__)
@pytest.mark.parametrize(("kind", "start"), [("sd_pipe", ""), ("sdxl_pipe", LONG)])
def test_every_control_works_on_weighted_and_long_prompts(
    control: Control, kind: str, start: str, request: pytest.FixtureRequest
) -> None:
    """Weights of 1 leave the image as it is; others change it."""
    pipe = request.getfixturevalue(kind)
    regions = (Region("red cat", (0, 0, 0.5, 1)), Region("mat", (0.5, 0, 1, 1)))
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "negative_prompt": "(bad:1.2)"}
    plain_one, same_one, weighted = (
        generate(pipe, Layout(start + prompt, regions=regions), control, **options).images[0]
        for prompt in ("a red cat on a mat", "a (red:1) cat on (a mat:1.0)", "a (red:1.5) cat on a mat")
    )
    assert torch.equal(plain_one, same_one) and not torch.equal(plain_one, weighted)


def _texts(pipe: Any, layout: Layout, control: Control) -> Tensor:
    """The prompt's row of the text that the denoiser reads in the first step."""
    seen: list[Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with hook, attach(pipe, layout, control):
        inner = pipe.unet.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        with inner:
            pipe(layout.prompt, num_inference_steps=1, output_type="latent", height=64, width=64)
    return seen[1][-1]


@pytest.mark.parametrize("start", ["(day:1.4), ", LONG])
def test_phrases_are_hidden_in_every_part(sd_pipe: Any, start: str) -> None:
    """Whatever the phrase says, all tokens but its own stay the same, up to the last part."""
    control, box = RegionBias(strength=1.0, hide_phrases=True), (0, 0, 0.5, 1)
    found = []
    for words in ("cat", "dog"):
        layout = Layout(f"{start}a {words} on a mat", regions=(Region(words, box),))
        with weighted_prompts(sd_pipe):
            own = positions_of(sd_pipe, layout)[0]
        found.append(_texts(sd_pipe, layout, control))
    others = [index for index in range(len(found[0])) if index not in own]
    assert len(found[0]) == (154 if start == LONG else 77)
    assert torch.equal(found[0][others], found[1][others]) and not torch.equal(*found)


def test_phrases_alone_keep_their_weights(sd_pipe: Any) -> None:
    """Dense modulation embeds each phrase by itself."""
    layout = Layout("a mat, a (red:1.5) cat", regions=(Region("Red cat", (0, 0, 0.5, 1)),))
    text = _texts(sd_pipe, layout, DenseModulation(w_cross=1.0, w_self=1.0, end=1.0))
    with weighted_prompts(sd_pipe):
        own = positions_of(sd_pipe, layout)[0]
        alone = encode_prompts(sd_pipe, "(red:1.5) cat")[0].states[0]
    assert torch.allclose(text[list(own)], alone[1:7], atol=1e-6)
