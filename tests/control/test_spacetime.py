"""Space-time attention: both forms of the mix against a direct computation, and rows that must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, OTHER, PROMPT, assert_same_draw, draw, noise, processors
from control_helpers import assert_close, bare_pipe, context
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor

from localctl.control.attach import attach
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention, local_text
from localctl.control.wrapping import Installation
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import AttentionLayer
from localctl.denoisers.unet import UNet
from localctl.layout import Layout, Region

SIZE = (6, 8)  # not square
TEXTS = ("cat", "dogs", "a tall dog")
REGIONS = (Region("cat", (0, 0, 0.6, 1)), Region("dogs", (0.4, 0.3, 1, 0.8), prompt="a tall dog"))
SCENE = Layout("cat and dogs", regions=REGIONS)


def encoded(denoiser: UNet, texts: list[str], arguments: Any) -> Tensor:
    """Return a fixed random context of each text, (n, 5, 12), seeded by the object that it names."""
    seeds = [TEXTS.index(text.removeprefix("a photo of ")) for text in texts]
    return torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.fixture
def attn(monkeypatch: pytest.MonkeyPatch) -> Attention:
    monkeypatch.setattr(UNet, "encode_texts", encoded)
    torch.manual_seed(0)
    return Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval().requires_grad_(False)


def by_hand(attn: Attention, cells: Tensor, text: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v head by head, then the output projection."""
    parts = [part.chunk(2, -1) for part in (attn.to_q(cells), attn.to_k(text), attn.to_v(text))]
    heads = [(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(*parts, strict=True)]
    return attn.to_out[0](torch.cat(heads, -1))


def mixed(control: SpaceTimeAttention, attn: Attention, layout: Any = SCENE, **where: Any) -> tuple[Tensor, ...]:
    """Return (output under control, cells, text), by default of two rows: negative prompt and prompt."""
    torch.manual_seed(1)
    place = context(**where)
    rows = len(place.conditional)
    cells, text = torch.randn(rows, SIZE[0] * SIZE[1], 16), torch.randn(rows, 7, 12)
    bound = control.bind(bare_pipe(), layout if isinstance(layout, list) else [layout])
    bound.begin_call({})
    installation = Installation()
    layer = AttentionLayer("attn2", True, SIZE)
    try:
        if bound.attends(place, layer):
            installation.add(attn, layer, layer, bound, place)
        return attn(cells, text), cells, text
    finally:
        installation.undo()


def parts_of(weights: tuple[float, ...], layout: Layout = SCENE) -> Tensor:
    """(regions, Q, 1): w_i m_i."""
    masks = layout.masks(SIZE).flatten(2).transpose(1, 2)
    return torch.tensor(weights)[:, None, None] * masks


@pytest.mark.parametrize("weights", [(0.3, 0.5), (0.9, 0.8), (1.0, 0.0)])
def test_the_convex_mix_is_the_papers_equation(attn: Attention, weights: tuple[float, ...]) -> None:
    output, cells, text = mixed(SpaceTimeAttention(weights=torch.tensor([weights] * 10)), attn)
    parts = parts_of(weights)
    assert bool((parts.sum(0) > 1).any()) == (weights == (0.9, 0.8))  # the boxes overlap
    parts = parts / parts.sum(0).clamp(min=1)  # at most 1 per cell
    local = torch.stack([by_hand(attn, cells[1], encoded(None, [name], None)[0]) for name in ("cat", "a tall dog")])
    expected = (1 - parts.sum(0)) * by_hand(attn, cells[1], text[1]) + (parts * local).sum(0)
    assert_close(output[1], expected)
    assert torch.equal(output[0], attn(cells, text)[0])  # the negative prompt's row


def test_the_released_mix_subtracts_the_negative_prompts_attention(attn: Attention) -> None:
    output, cells, text = mixed(SpaceTimeAttention(mix="released"), attn)
    parts = parts_of((2.5, 2.5))  # 5 / 2 objects, not bounded
    local = torch.stack([by_hand(attn, cells[1], encoded(None, [name], None)[0]) for name in ("cat", "a tall dog")])
    negative = by_hand(attn, cells[0], text[0])
    expected = by_hand(attn, cells[1], text[1]) + (parts * (local - negative)).sum(0)
    assert_close(output[1], expected)
    assert torch.equal(output[0], attn(cells, text)[0])
    with pytest.raises(ValueError, match="generate with a guidance_scale above 1"):
        mixed(SpaceTimeAttention(mix="released"), attn, layout_of_row=(0,), conditional=(True,))


def test_every_row_is_mixed_by_its_own_layout(attn: Attention) -> None:
    other = Layout("cat cat", regions=(Region("cat", (0, 0, 1, 0.5), strength=0.6, occurrence=1),))
    rows = {"layout_of_row": (0, 1, 0, 1), "conditional": (False, False, True, True)}
    given = [torch.tensor([[0.5, 0.5]] * 10), torch.tensor([[0.3]] * 10)]
    output, cells, text = mixed(SpaceTimeAttention(weights=given), attn, [SCENE, other], **rows)
    assert torch.equal(mixed(SpaceTimeAttention(weight=0.5), attn, [SCENE, other], **rows)[0], output)
    assert torch.equal(output[:2], attn(cells, text)[:2])
    for row, (layout, weights) in enumerate([(SCENE, (0.5, 0.5)), (other, (0.3,))], start=2):
        parts = parts_of(weights, layout)
        names = [region.prompt or region.phrase for region in layout.regions]
        local = torch.stack([by_hand(attn, cells[row], encoded(None, [name], None)[0]) for name in names])
        expected = (1 - parts.sum(0)) * by_hand(attn, cells[row], text[row]) + (parts * local).sum(0)
        assert_close(output[row], expected)


@pytest.mark.parametrize(
    ("phrase", "prompt", "expected"),
    [
        ("white couch", None, "a photo of white couch"),
        ("white couch", "the white couch", "a photo of the white couch"),  # the phrase of a predicted layout
        ("bed", "The  bed", "a photo of The  bed"),
        ("dogs", "two dogs", "a photo of two dogs"),
        ("dogs", "their 3 dogs", "a photo of their 3 dogs"),
        ("dog", "a tall dog", "a tall dog"),
        ("cat", "an oil painting of a cat", "an oil painting of a cat"),
        ("cat", "a photo of a cat", "a photo of a cat"),
        ("{cat}", None, "a photo of {cat}"),
        (None, "the cat", "the cat"),
        (None, None, None),
    ],
)
def test_the_published_description_of_a_name(phrase: str | None, prompt: str | None, expected: str | None) -> None:
    region = Region(phrase, (0, 0, 1, 1), prompt=prompt)
    assert local_text(region, SpaceTimeAttention().template) == expected
    assert local_text(region, "{}") == (prompt or phrase)


def test_the_template_is_what_is_encoded(sd_pipe: StableDiffusionPipeline) -> None:
    whole = Layout(PROMPT, regions=(Region("cat", (0, 0, 1, 1)),))
    with attach(sd_pipe, whole, SpaceTimeAttention(weight=1.0, template="{}")):
        generated = draw(sd_pipe)
    assert_same_draw(generated, draw(sd_pipe, "cat"))


def test_gradients_reach_weights_of_zero_and_of_one(attn: Attention) -> None:
    weights = torch.tensor([[0.0, 1.0]] * 10, requires_grad=True)
    mixed(SpaceTimeAttention(weights=weights), attn)[0].square().sum().backward()
    assert weights.grad is not None and bool((weights.grad[0] != 0).all()) and not weights.grad[1:].any()
    alone = torch.ones(10, 1, requires_grad=True)  # no cell is less than full
    whole = Layout("cat", regions=(Region("cat", (0, 0, 1, 1)),))
    mixed(SpaceTimeAttention(weights=alone), attn, whole)[0].square().sum().backward()
    assert alone.grad is not None and abs(float(alone.grad[0])) > 1e-3


def test_the_weights_of_every_step() -> None:
    regions = (
        Region("cat", (0, 0, 1, 1), start=0.5),
        Region("dogs", (0, 0, 1, 1), strength=0.5),
        Region(box=(0, 0, 1, 1)),
    )
    layout = Layout("cat dogs", regions=regions)
    weights = SpaceTimeAttention(weight=0.8, schedule="linear", end=0.8).step_weights(layout, 10)
    fade = torch.tensor([0.8 * (1 - step / 8) if step < 8 else 0.0 for step in range(10)])
    torch.testing.assert_close(weights[:, 1], 0.5 * fade)
    torch.testing.assert_close(weights[:, 0], torch.cat([torch.zeros(5), fade[5:]]))
    assert not weights[:, 2].any()  # without words
    assert SpaceTimeAttention(schedule="cosine").step_weights(layout, 4)[:, 1].tolist() == pytest.approx(
        [0.25, 0.25 * (0.5 + 0.5**1.5), 0.125, 0.25 * (0.5 - 0.5**1.5)]
    )
    assert SpaceTimeAttention(mix="released").step_weights(layout, 3)[:, 1].tolist() == [1.25] * 3  # 5 / 2 * strength


def test_the_published_discs() -> None:
    region = Region.disc("cat", (0.3, 0.6))
    for side in (8, 16, 64):
        axis = torch.arange(side) / side
        expected = ((axis[None] - 0.3) ** 2 + (axis[:, None] - 0.6) ** 2 < 0.04).float()
        assert torch.equal(region.coverage((side, side), "nearest"), expected)
    assert float(region.coverage((100, 200)).mean()) == pytest.approx(3.1416 * 0.04, rel=0.01)
    for bad in ({"centre": (1.2, 0)}, {"centre": (0.5, 0.5), "radius": 0}):
        with pytest.raises(ValueError, match="of a disc must be"):
            Region.disc("cat", **bad)


SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "euler": EulerDiscreteScheduler}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [5, *(pytest.param(count, marks=pytest.mark.slow) for count in (20, 50))])
def test_a_weight_of_one_step_acts_in_that_step_alone(
    sd_pipe: StableDiffusionPipeline, scheduler: str, steps: int
) -> None:
    """Two layouts with two images each, not square: only the prompt rows of one step change, nothing before it."""
    options = {"skip_prk_steps": True} if scheduler == "pndm" else {}
    sd_pipe.scheduler = SCHEDULERS[scheduler].from_config(sd_pipe.scheduler.config, **options)
    seen: list[Tensor] = []
    sd_pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    call = {"prompt": [PROMPT, OTHER.prompt], "num_images_per_prompt": 2, "height": 64, "width": 96}
    call |= {"num_inference_steps": steps, "latents": noise(4, (8, 12))}
    chosen = steps - 2
    weights = [torch.zeros(steps, len(layout.regions)) for layout in (LAYOUT, OTHER)]
    plain = draw(sd_pipe, **call)
    with attach(sd_pipe, [LAYOUT, OTHER], SpaceTimeAttention(weights=weights)):
        assert torch.equal(draw(sd_pipe, **call), plain)
    before, calls = seen[: len(seen) // 2], len(seen) // 2
    seen.clear()
    for tensor in weights:
        tensor[chosen] = 1.0
    with attach(sd_pipe, [LAYOUT, OTHER], SpaceTimeAttention(weights=weights)):
        changed = draw(sd_pipe, **call)
    assert all((changed - plain).flatten(1).abs().amax(dim=1) > 1e-5)
    place = calls - 2  # PNDM's additional call comes early
    assert all(torch.equal(a, b) for a, b in zip(before[:place], seen[:place], strict=True))
    assert torch.equal(before[place][:4], seen[place][:4])
    assert bool(((before[place] - seen[place])[4:].flatten(1).abs().amax(dim=1) > 1e-6).all())


@pytest.mark.parametrize("kind", ["sd_pipe", "sdxl_pipe", "v_pipe"])
@pytest.mark.parametrize("mix", ["convex", "released"])
def test_zero_is_plain_one_everywhere_is_the_local_text(kind: str, mix: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)
    before = processors(pipe)
    whole = Layout(PROMPT, regions=(Region("cat", (0, 0, 1, 1)),))
    plain = draw(pipe)
    with attach(pipe, whole, SpaceTimeAttention(weight=0.0, mix=mix)):
        assert torch.equal(draw(pipe), plain)
    with attach(pipe, whole, SpaceTimeAttention(weight=1.0, mix=mix)):
        local = draw(pipe)
    assert (local - plain).abs().max() > 1e-4
    if mix == "convex" and kind != "sdxl_pipe":  # SDXL's pooled text stays the prompt's
        assert_same_draw(local, draw(pipe, "a photo of cat"))
    after = processors(pipe)
    assert all(after[name] is before[name] for name in before) and torch.equal(draw(pipe), plain)


def test_an_image_does_not_depend_on_its_batch(sd_pipe: StableDiffusionPipeline) -> None:
    latents = noise(2)
    with attach(sd_pipe, [LAYOUT, OTHER], SpaceTimeAttention(weight=0.7)):
        both = draw(sd_pipe, [PROMPT, OTHER.prompt], latents=latents)
    for index, layout in enumerate((LAYOUT, OTHER)):
        with attach(sd_pipe, layout, SpaceTimeAttention(weight=0.7)):
            alone = draw(sd_pipe, layout.prompt, latents=latents[index : index + 1])
        assert_same_draw(both[index], alone[0])


def test_biases_of_other_controls_leave_the_local_texts_alone(sd_pipe: StableDiffusionPipeline) -> None:
    """With weight 1 everywhere, only the local text is attended to, so a bias on words of the prompt has no effect."""
    whole = Layout(PROMPT, regions=(Region("cat", (0, 0, 1, 1)),))
    bias = RegionBias(strength=3.0, outside_strength=1.0)
    with attach(sd_pipe, whole, SpaceTimeAttention(weight=1.0)):
        alone = draw(sd_pipe)
    with attach(sd_pipe, whole, [bias, SpaceTimeAttention(weight=1.0)]):
        assert_same_draw(draw(sd_pipe), alone)
    with attach(sd_pipe, LAYOUT, SpaceTimeAttention(weight=0.5)):
        half = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, [bias, SpaceTimeAttention(weight=0.5)]):
        assert (draw(sd_pipe) - half).abs().max() > 1e-4


def test_local_texts_are_encoded_as_prompts(sdxl_pipe: Any) -> None:
    draw(sdxl_pipe)
    texts = denoiser_of(sdxl_pipe).encode_texts(["cat", "dogs"], {"device": "cpu"})
    assert texts.shape == (2, 77, 32) and not torch.equal(texts[0], texts[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "sum"}, "Unknown mix 'sum'"),
        ({"schedule": "steep"}, "Unknown schedule 'steep'"),
        ({"template": "a photo"}, "template must hold {} once, in place of the name, not 'a photo'"),
        ({"template": "{} and {}"}, "template must hold {} once"),
        ({"weight": 1.2}, r"must lie in \[0, 1\], not 1.2"),
        ({"weight": float("nan"), "mix": "released"}, "finite number"),
        ({"start": 0.5, "end": 0.5}, "0 <= start < end"),
        ({"weights": torch.ones(3)}, "float tensor"),
        ({"weights": torch.full((3, 2), 1.5)}, 'use mix="released"'),
        ({"weights": torch.full((3, 2), torch.inf), "mix": "released"}, "not finite"),
        ({"weights": ("0", "1")}, "float tensor"),
    ],
)
def test_bad_settings_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        SpaceTimeAttention(**options)
    assert "\n" not in str(raised.value)


def test_what_does_not_fit_the_layout_or_the_call(sd_pipe: StableDiffusionPipeline) -> None:
    for control, message in (
        (SpaceTimeAttention(weights=torch.ones(2, 3)), "3 regions but the layout 'a cat, dogs' has 2"),
        (SpaceTimeAttention(weights=[torch.ones(2, 2)] * 2), "weights are for 2 layouts but 1 are attached"),
    ):
        with pytest.raises(ValueError, match=message), attach(sd_pipe, LAYOUT, control):
            pass
    strong = Layout(PROMPT, regions=(Region("cat", (0, 0, 1, 1), strength=2.0),))
    with pytest.raises(ValueError, match="strength of the region 'cat'"), attach(sd_pipe, strong, SpaceTimeAttention()):
        pass
    three = SpaceTimeAttention(weights=torch.ones(3, 2))
    with attach(sd_pipe, LAYOUT, three), pytest.raises(ValueError, match="for 3 steps but this call makes 2"):
        draw(sd_pipe)
