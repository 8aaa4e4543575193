"""Families of transformers under controls: exact where nothing acts, and as computed by hand where something does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import PROMPT, SIDE, Family, latents_of, run, token_adapter
from PIL import Image
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.control.forward_guidance import ForwardGuidance
from localctl.control.image_controls import LocalAdapterControl
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.denoisers import denoiser_of
from localctl.image_to_image import InitImage
from localctl.layout import Layout, Region
from localctl.sampling import generate

pytest_plugins = ["families"]
CAT, DOGS = Region("Cat", (0, 0, 0.5, 1), negative_prompt="x"), Region("dogs", (0.5, 0, 1, 1))
LAYOUT = Layout(PROMPT, regions=(CAT, DOGS))
METHODS: dict[str, Callable[[], Control]] = {
    "bias": lambda: RegionBias(strength=1.0, outside_strength=0.5),
    "hidden": lambda: RegionBias(strength=1.0, hide_phrases=True),
    "dense": lambda: DenseModulation(rest="segment", end=1.0, w_self=1.0, decay=0.0),
    "guidance": lambda: LayoutGuidance(end=1.0, threshold=0.0, scale=20.0),
    "forward": lambda: ForwardGuidance(end=1.0),
    "spacetime": lambda: SpaceTimeAttention(weight=0.8),
    "negative": NegativePrompts,
}


def assert_same(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """Equal but for rounding in other orders of summation, as a share of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def adapter_control(adapter: LocalAdapter, mask: Tensor | float = 1.0, seed: int = 3, **options: Any) -> Any:
    size = mask.shape[-2:] if isinstance(mask, Tensor) else (SIDE, SIDE)
    white = mask if isinstance(mask, Tensor) else torch.full((1, *size), mask)
    condition = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed))
    return LocalAdapterControl(adapter, condition, white, **options)


def left_half(height: int = SIDE, width: int = SIDE) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


def blocks_of(pipe: Any) -> list[Any]:
    denoiser: Any = denoiser_of(pipe)
    return [block for _, block in denoiser.blocks]


def state_of(pipe: Any) -> list[Any]:
    """All that attach touches: processors, hooks and attributes of every part."""
    parts = [pipe.transformer, *pipe.transformer.modules()]
    hooks = [(dict(part._forward_hooks), dict(part._forward_pre_hooks), part.forward) for part in parts]
    own = sorted(set(vars(pipe)) - {name for name in vars(pipe) if name.startswith("_") or name == "config"})
    processors = [part.processor for part in parts if hasattr(part, "processor")]
    return [processors, hooks, own, vars(pipe.scheduler).get("step")]


@pytest.mark.parametrize("guided", [False, True])
def test_what_has_no_strength_changes_no_bit(family: Family, dit: Any, guided: bool) -> None:
    idle = [
        adapter_control(token_adapter(dit), 0.0),
        adapter_control(token_adapter(dit), weight=0.0),
        RegionBias(strength=0.0),
        DenseModulation(w_cross=0.0, w_self=0.0),
        LayoutGuidance(scale=0.0),
        SpaceTimeAttention(weight=0.0),
        AttentionMaps(),
    ]
    options: dict[str, Any] = {"guided": guided, **({"negative_prompt": "dogs"} if guided else {})}
    plain, before = run(family, dit, **options), state_of(dit)
    with attach(dit, LAYOUT, idle):
        assert torch.equal(run(family, dit, **options), plain)
    assert state_of(dit) == before
    assert torch.equal(run(family, dit, **options), plain)


def test_features_may_leave_out_the_negative_prompt(family: Family, dit: Any) -> None:
    def first_step(*controls: Control) -> list[Tensor]:
        """Return what the transformer returns for the row of the prompt and for that of the negative prompt."""
        seen: list[Tensor] = []
        hook = dit.transformer.register_forward_hook(lambda module, args, output: seen.extend(output[0]))
        with attach(dit, LAYOUT, controls):
            run(family, dit)
        hook.remove()
        return seen[:2] if family.calls == 2 or family.row == 0 else seen[1::-1]

    control = adapter_control(token_adapter(dit), unconditional_scale=0)
    plain, found = first_step(), first_step(control)
    assert (found[0] - plain[0]).abs().max() > 1e-4 and torch.equal(found[1], plain[1])
    with pytest.raises(ValueError, match="unconditional_scale=0 acts on the rows of"), attach(dit, LAYOUT, control):
        run(family, dit, guided=False)


@pytest.mark.parametrize("kind", METHODS)
def test_each_method_acts_and_leaves_no_trace(family: Family, dit: Any, kind: str) -> None:
    """Also with several prompts and images each, not square, and after an error."""
    size: dict[str, Any] = {"height": SIDE, "width": 2 * SIDE}
    prompts, before = [PROMPT, "dogs x"], state_of(dit)
    plain = run(family, dit, prompts, 4, num_images_per_prompt=2, negative_prompt=["s", "s"], **size)
    other = Layout("dogs x", regions=(Region("dogs", (0, 0, 1, 0.5), negative_prompt="cat"),))
    with attach(dit, [LAYOUT, other], METHODS[kind]()):
        found = run(family, dit, prompts, 4, num_images_per_prompt=2, negative_prompt=["s", "s"], **size)
    assert found.isfinite().all() and ((found - plain).flatten(1).abs().amax(dim=1) > 1e-4).all()
    assert state_of(dit) == before
    alone = latents_of(dit, 4, (SIDE, 2 * SIDE))[3:]
    with attach(dit, other, METHODS[kind]()):
        single = run(family, dit, "dogs x", negative_prompt="s", latents=alone, **size)
    assert_same(single, found[3:], 2e-3)

    def stop(*args: Any) -> None:
        raise RuntimeError("stopped")

    hook = blocks_of(dit)[2].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"), attach(dit, LAYOUT, METHODS[kind]()):
        run(family, dit)
    hook.remove()
    assert state_of(dit) == before


@pytest.mark.parametrize("covered", ["all", "half"])
def test_a_residual_is_the_feature_times_the_mask_on_the_image_s_tokens(family: Family, dit: Any, covered: str) -> None:
    adapter = token_adapter(dit, levels=2)  # after the first and the third of four blocks
    mask = left_half() if covered == "half" else torch.ones(1, SIDE, SIDE)
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(family.image_input(args, kwargs).clone())

    hooks = [blocks_of(dit)[place].register_forward_pre_hook(look, with_kwargs=True) for place in (1, 2)]
    control = adapter_control(adapter, mask)
    run(family, dit, num_inference_steps=1)
    with attach(dit, LAYOUT, control):
        run(family, dit, num_inference_steps=1)
    plain, steered = seen[0], seen[len(seen) // 2]
    for hook in hooks:
        hook.remove()
    assert torch.equal(steered[:, 4:], plain[:, 4:])  # of a sequence with text as well
    plain, steered = plain[:, :4], steered[:, :4]
    feature = adapter(torch.cat([control.condition, control.mask], dim=1))[0].flatten(2).mT  # (1,Q,C)
    inside = mask[:, ::16, ::16].flatten(1).bool()[0]
    assert_same(steered - plain, feature.expand_as(plain))
    assert torch.equal(steered[:, ~inside], plain[:, ~inside]) and not feature[:, ~inside].any()
    assert feature[:, inside].abs().min() > 0


def test_two_adapters_add_up(family: Family, dit: Any) -> None:
    first, second = token_adapter(dit, seed=1), token_adapter(dit, levels=3, seed=2)
    left = adapter_control(first, left_half())
    right = adapter_control(second, 1 - left_half(), seed=5)
    with attach(dit, LAYOUT, [left, right]):
        both = run(family, dit)
    with attach(dit, LAYOUT, left), attach(dit, LAYOUT, [right]):
        assert_same(run(family, dit), both)
    with attach(dit, LAYOUT, [left]):
        assert (run(family, dit) - both).abs().max() > 1e-4
    with attach(dit, LAYOUT, [left, RegionBias(strength=1.0)]), attach(dit, LAYOUT, LayoutGuidance(end=1.0)):
        assert run(family, dit).isfinite().all()


def test_nested_controls_of_both_halves_of_attention_add_up(family: Family, dit: Any) -> None:
    """The outer one steers image to image alone, the inner one text; after the inner one, the outer is alone again."""
    outer, inner = DenseModulation(end=1.0, w_cross=0.0, w_self=1.0, decay=0.0), SpaceTimeAttention(weight=0.8)
    with attach(dit, LAYOUT, [outer, inner]):
        both = run(family, dit)
    with attach(dit, LAYOUT, outer):
        alone = run(family, dit)
        with attach(dit, LAYOUT, inner):
            assert_same(run(family, dit), both)
        assert torch.equal(run(family, dit), alone)
    assert (both - alone).abs().max() > 1e-4


def test_a_description_of_the_whole_image_acts_as_the_prompt(family: Family, dit: Any) -> None:
    """At full weight everywhere; pooled embeddings stay those of the call."""
    whole = Layout(PROMPT, regions=(Region("Cat", (0, 0, 1, 1), prompt="s dog, a dog"),))
    with attach(dit, whole, SpaceTimeAttention(weight=1.0)):
        found = run(family, dit)
    assert_same(found, run(family, dit, None, **family.embeds(dit, "s dog, a dog", PROMPT, "")))
    assert (found - run(family, dit)).abs().max() > 1e-3


def test_a_negative_prompt_of_the_whole_image_acts_as_that_of_the_call(family: Family, dit: Any) -> None:
    whole = Layout(PROMPT, regions=(Region("Cat", (0, 0, 1, 1), negative_prompt="dog s, cat"),))
    with attach(dit, whole, NegativePrompts()):
        found = run(family, dit)
    expected = run(family, dit, None, **family.embeds(dit, PROMPT, PROMPT, "dog s, cat"))
    assert_same(found, expected)
    assert (found - run(family, dit)).abs().max() > 1e-3


def test_bias_and_heat_maps_are_those_of_queries_and_keys(family: Family, dit: Any) -> None:
    """In the first layer, of the second of two steps: the bias in what it returns, and the map of its attention."""
    denoiser, seen = denoiser_of(dit), []
    layer, attn = next((layer, attn) for layer, attn in denoiser.attention_layers((4, 4)) if layer.cross)

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args, kwargs, output))

    hook = attn.register_forward_hook(look, with_kwargs=True)
    maps = AttentionMaps(start=0.5, sites=("0",))
    with attach(dit, LAYOUT, [RegionBias(strength=1.0, outside_strength=0.5), maps]):
        run(family, dit)
    hook.remove()
    *inputs, output = seen[-family.calls]
    query, key, value, text, mask = family.projections(attn, *inputs)  # of the row with the prompt, (H,*,d)
    scores = query @ key.mT * query.shape[-1] ** -0.5  # (H,Q,S)
    attended = scores[..., text][..., mask[text] == 0]
    bias = torch.zeros(4, scores.shape[-1])
    for inside, tokens in zip(((0, 2), (1, 3)), denoiser.token_positions(LAYOUT), strict=True):
        for place in tokens:
            bias[:, text.start + place] = -0.5
            bias[inside, text.start + place] = 1.0
    sigma = float(dit.scheduler.sigmas[1])
    if denoiser.prediction_type == "flow":
        sigma = sigma / (1 - sigma)
    probabilities = (scores + mask + sigma * attended.std() * bias).softmax(dim=-1)
    expected = family.output(attn, (probabilities @ value).transpose(0, 1).flatten(1))  # (Q,C)
    torch.testing.assert_close(family.image_of(output)[family.row, :4], expected, rtol=1e-5, atol=1e-5)
    for region, tokens in enumerate(denoiser.token_positions(LAYOUT)):
        heat = probabilities[..., [text.start + place for place in tokens]].mean(dim=(0, 2))
        torch.testing.assert_close(maps.recorder.records[0].sums[layer.size][0, region], heat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bias", "hidden", "dense", "forward"])
def test_attention_moves_into_the_region(family: Family, dit: Any, kind: str) -> None:
    plain, maps = AttentionMaps(), AttentionMaps()
    with attach(dit, LAYOUT, plain):
        run(family, dit)
    with attach(dit, LAYOUT, [METHODS[kind](), maps]):
        run(family, dit)
    for region in range(2):
        assert maps.mass(0, region) > plain.mass(0, region) + 1e-3


def test_guidance_moves_attention_into_the_regions(family: Family, dit: Any) -> None:
    """In the layers that it reads, by the moves before one step."""
    where = ("1",)
    plain, maps = AttentionMaps(sites=where), AttentionMaps(sites=where)
    with attach(dit, LAYOUT, plain):
        run(family, dit, num_inference_steps=1)
    with attach(dit, LAYOUT, [LayoutGuidance(scale=0.5, end=1.0, threshold=0.0, sites=where), maps]):
        run(family, dit, num_inference_steps=1)
    assert sum(maps.mass(0, region) - plain.mass(0, region) for region in range(2)) > 1e-5


def test_guidance_moves_each_image_of_a_batch_alike_through_an_adapter(family: Family, dit: Any) -> None:
    """The network runs again for the gradient, with the residuals of the images that it moves."""
    layouts = [LAYOUT, Layout("dogs x", regions=(Region("dogs", (0, 0, 1, 0.5)),))]
    control = adapter_control(token_adapter(dit), left_half())
    with attach(dit, layouts, [control, METHODS["guidance"]()]):
        both = run(family, dit, ["A Cat, dogs", "dogs x"], 2)
    with attach(dit, layouts[1], [control, METHODS["guidance"]()]):
        alone = run(family, dit, "dogs x", latents=latents_of(dit, 2)[1:])
    assert_same(both[1:], alone, 2e-3)


def test_generate_makes_the_same_image_in_any_batch(family: Family, dit: Any) -> None:
    options = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "latent", **family.call}
    control = RegionBias(strength=1.0)
    both = generate(dit, LAYOUT, control, seeds=[3, 7], **options).images
    alone = generate(dit, LAYOUT, control, seeds=7, batch_size=1, **options).images
    assert_same(both[1], alone[0])
    with pytest.raises(ValueError, match="The prompt 'a \\(cat:1.3\\)' has weights"):
        generate(dit, "a (cat:1.3)", control, **options)


def test_sampling_begins_at_an_image_where_diffusers_has_a_pipeline(family: Family, dit: Any) -> None:
    image = Image.fromarray(np.arange(SIDE * 2 * SIDE * 3).astype(np.uint8).reshape(SIDE, 2 * SIDE, 3))
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "init": InitImage(image, 0.5)}
    control = adapter_control(token_adapter(dit), left_half(SIDE, 2 * SIDE))
    if not family.image_to_image:
        with pytest.raises(ValueError, match="has no image-to-image pipeline beside"):
            generate(dit, LAYOUT, control, **options)
        return
    call = {**options, **family.call}
    plain = generate(dit, LAYOUT, [], seeds=[1, 2], **call).images
    assert plain[0].numel() == 4 * 4 * 8
    for steers in (control, RegionBias(strength=1.0), METHODS["guidance"](), METHODS["spacetime"]()):
        found = generate(dit, LAYOUT, steers, seeds=[1, 2], **call).images
        assert all((one - other).abs().max() > 1e-4 for one, other in zip(found, plain, strict=True))
    idle = adapter_control(token_adapter(dit), torch.zeros(1, SIDE, 2 * SIDE))
    same = generate(dit, LAYOUT, idle, seeds=[1, 2], **call).images
    assert all(torch.equal(one, other) for one, other in zip(same, plain, strict=True))
    dit.transformer.register_to_config(in_channels=16)  # this pipeline takes no other number
    inpainted = {**call, "init": InitImage(image, 0.5, left_half(SIDE, 2 * SIDE)), "output_type": "pil"}
    assert generate(dit, LAYOUT, METHODS["guidance"](), **inpainted).images[0].size == (2 * SIDE, SIDE)


def test_what_a_base_cannot_do_is_said(family: Family, dit: Any) -> None:
    with pytest.raises(ValueError, match="choose among early, middle, late and the numbers of its blocks, 0 to 3"):
        attach(dit, LAYOUT, LayoutGuidance(sites=("mid",))).__enter__()
    for control in (LayoutGuidance(sites=()), ForwardGuidance(sites=())):
        with pytest.raises(ValueError, match="needs at least one layer"):
            attach(dit, LAYOUT, control).__enter__()
    with (
        pytest.raises(ValueError, match="makes features of shapes .* takes"),
        attach(dit, LAYOUT, adapter_control(token_adapter(dit, width=24))),
    ):
        run(family, dit)
    blocks_of(dit)[0].forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="was replaced"), attach(dit, LAYOUT, RegionBias()):
        run(family, dit)
