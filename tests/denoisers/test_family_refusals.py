"""What would silently do nothing on a transformer is refused in one sentence, and phrases are found in T5's tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from families import FAMILIES, PROMPT, SIDE, Family, frozen, latents_of, run, token_adapter
from PIL import Image
from torch import Tensor

from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import BoundControl, Control
from localctl.control.dense import DenseModulation
from localctl.control.image_controls import LocalAdapterControl
from localctl.control.ip_adapter import ImagePrompt, IPAdapterControl
from localctl.control.latents import outer_step
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.denoisers import denoiser_of
from localctl.layout import Layout, Region
from localctl.pipelines import set_scheduler
from localctl.weight_search.differentiable import sample_latents

pytest_plugins = ["families"]
LAYOUT = Layout(PROMPT, regions=(Region("Cat", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0, 1, 1))))


class Skips(Control):
    """Changes skip connections, which only U-Nets have."""

    def bind(self, pipe: Any, layouts: Any) -> BoundControl:
        class Bound(BoundControl):
            def block_residuals(self, context: Any, inputs: Any) -> None:
                return None

        return Bound()


@pytest.fixture
def pixart(family_folders: Callable[[str], Any]) -> Any:
    return frozen(diffusers.DiffusionPipeline.from_pretrained(family_folders("pixart")))


@pytest.fixture
def sd3(family_folders: Callable[[str], Any]) -> Any:
    return frozen(diffusers.DiffusionPipeline.from_pretrained(family_folders("sd3")))


def refused(pipe: Any, name: str, match: str, control: Any = None, **options: Any) -> None:
    layout = options.pop("layout", LAYOUT)
    with (
        pytest.raises(ValueError, match=match),
        attach(pipe, layout, RegionBias(strength=1.0) if control is None else control),
    ):
        run(FAMILIES[name], pipe, layout.prompt, **options)


@pytest.mark.parametrize("kind", ["first block", "broadcast"])
def test_caches_that_skip_layers_are_refused(family: Family, dit: Any, kind: str) -> None:
    """They would add residuals twice, or keep a region's bias beyond its window."""
    if kind == "first block":
        apply_first_block_cache(dit.transformer, FirstBlockCacheConfig())
    else:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
        apply_pyramid_attention_broadcast(dit.transformer, config)
    adapter = LocalAdapterControl(token_adapter(dit), torch.rand(1, SIDE, SIDE), torch.ones(1, SIDE, SIDE))
    for control in (RegionBias(strength=1.0), adapter):
        refused(dit, family.name, f"The {denoiser_of(dit).name} has a .*, which skips layers", control)


def test_what_is_for_other_denoisers_is_refused(family: Family, dit: Any) -> None:
    with pytest.raises(ValueError, match="was made for a U-Net, and the base has a"):
        denoiser_of(dit).check_controlnet({})
    with pytest.raises(ValueError, match="Skips acts by block_residuals, for which a"):
        attach(dit, LAYOUT, Skips()).__enter__()
    with pytest.raises(ValueError, match="which ignores their masks; leave IPAdapterControl out"):
        IPAdapterControl([ImagePrompt(Image.new("RGB", (8, 8)))]).bind(dit, [LAYOUT])
    with pytest.raises(ValueError, match=f"prompt_weighting=True acts on .* not on a {denoiser_of(dit).name}"):
        attach(dit, LAYOUT, [], prompt_weighting=True).__enter__()
    modular = SimpleNamespace(transformer=dit.transformer, scheduler=dit.scheduler)
    with pytest.raises(ValueError, match="has no encode_prompt; attach to a pipeline of"):
        attach(modular, LAYOUT, []).__enter__()  # type: ignore[arg-type]
    dit.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"a transformer \(Linear\) not known here; attach to a pipeline of"):
        denoiser_of(dit)


def test_settings_that_sd3_s_attention_ignores_are_refused(sd3: Any) -> None:
    """Its processor takes an attention mask and does nothing with it."""
    mask = {"attention_mask": torch.zeros(1, 1, 1, 1)}
    refused(sd3, "sd3", "ignores attention_mask in joint_attention_kwargs", joint_attention_kwargs=mask)
    refused(sd3, "sd3", "the third text encoder would read 'dogs'; leave prompt_3 out", prompt_3="dogs")


def test_processors_without_a_place_for_a_bias_are_refused_before_the_first_step(sd3: Any) -> None:
    calls: list[int] = []
    sd3.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    sd3.transformer.fuse_qkv_projections()
    refused(sd3, "sd3", r"FusedJointAttnProcessor2_0, which takes no .*; call pipe.transformer.unfuse_qkv_projections")
    assert not calls


def test_schedulers_that_lose_a_shift_or_are_for_other_bases_are_refused(sd3: Any) -> None:
    with pytest.raises(ValueError, match="which the scheduler ddim is not for; leave it out, or choose one of euler"):
        set_scheduler(sd3, "ddim")
    set_scheduler(sd3, "heun")
    refused(sd3, "sd3", "FlowMatchHeunDiscreteScheduler would lose a control's shift", LayoutGuidance(end=1.0))
    with attach(sd3, LAYOUT, RegionBias(strength=1.0)):
        assert run(FAMILIES["sd3"], sd3).isfinite().all()


def test_all_calls_of_a_step_get_the_same_shift(sd3: Any) -> None:
    """Skip-layer guidance calls the transformer once more in a step."""
    seen: list[Tensor] = []
    hook = sd3.transformer.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with attach(sd3, LAYOUT, LayoutGuidance(end=1.0, threshold=0.0, iterations=1)):
        run(FAMILIES["sd3"], sd3, skip_guidance_layers=[1], skip_layer_guidance_start=-1, skip_layer_guidance_stop=2)
    hook.remove()
    calls = [latents for latents in seen if not latents.requires_grad]
    guided, skipping = calls[0::2], calls[1::2]
    assert len(guided) == len(skipping) == 2
    for both, one in zip(guided, skipping, strict=True):
        assert both.shape[0] == 2 and torch.equal(both[1:], one)


def test_guidance_of_a_control_is_the_same_in_the_call_that_skips_layers(sd3: Any) -> None:
    """There, all rows are those of prompts, but the call of the pipeline has a negative prompt."""
    adapter = token_adapter(sd3)
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}
    found = []
    for options in ({"unconditional_scale": 0.0}, {"guidance_scale": 4.0}, {"guidance_scale": 2.0}):
        control = LocalAdapterControl(adapter, torch.ones(1, SIDE, SIDE), torch.ones(1, SIDE, SIDE), **options)
        with attach(sd3, LAYOUT, control):
            found.append(run(FAMILIES["sd3"], sd3, guidance_scale=4.0, **skipping))
    torch.testing.assert_close(found[1], found[0])
    assert (found[2] - found[0]).abs().max() > 1e-4


def test_heat_maps_are_of_the_call_that_skips_no_layers(sd3: Any) -> None:
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}
    heat = []
    for options in ({}, skipping):
        maps = AttentionMaps()
        with attach(sd3, LAYOUT, maps):
            run(FAMILIES["sd3"], sd3, num_inference_steps=1, **options)
        heat.append(maps.heat(0, 1))
    assert torch.equal(*heat) and heat[0].max() > 0


def test_weights_in_any_text_of_a_call_are_refused(sd3: Any) -> None:
    """Otherwise their marks would be read as text."""
    refused(sd3, "sd3", r"The prompt '\(x:1.3\)' has weights, which acts on", negative_prompt="(x:1.3)")
    for name in ("prompt", "negative_prompt"):
        own = Layout(PROMPT, regions=(Region("Cat", (0, 0, 1, 1), **{name: "((dog))"}),))  # type: ignore[arg-type]
        refused(sd3, "sd3", r"The prompt '\(\(dog\)\)' has weights, which acts on", layout=own)
    with attach(sd3, LAYOUT, RegionBias(strength=1.0), prompt_weighting=False):
        assert run(FAMILIES["sd3"], sd3, negative_prompt="(x:1.3)").isfinite().all()
    assert "encode_prompt" not in vars(sd3)


@pytest.mark.parametrize("steps", [20, 250, 1000])
def test_a_timestep_that_is_rounded_to_bfloat16_is_still_its_own_step(steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sample = torch.zeros(1)
    for place, time in enumerate(scheduler.timesteps):
        assert outer_step(scheduler, float(time.bfloat16())) == (place, steps)
        scheduler.step(sample, time, sample)


@pytest.mark.parametrize("prompt", ["A Cat, dogs", "  A   Cat,  DOGS ", "xx, a\tCat,dogs"])
def test_phrases_are_found_in_t5_s_tokens(pixart: Any, sd3: Any, prompt: str) -> None:
    """However they are written, at the places of the embeddings that the layers get."""
    layout = Layout(prompt, regions=(Region(prompt[prompt.index("Cat") :][:3], (0, 0, 1, 1)),))
    for pipe, tokenizer, text, first in (
        (pixart, pixart.tokenizer, prompt.lower().strip(), 0),
        (sd3, sd3.tokenizer_3, prompt, 77),
    ):
        (places,) = denoiser_of(pipe).token_positions(layout)
        ids = tokenizer(text).input_ids
        found = tokenizer.convert_ids_to_tokens([ids[place - first] for place in places if place >= first])
        assert "".join(found).replace("▁", "").lower().replace("<unk>", "c") == "cat"
        if first:
            clip = [place for place in places if place < first]
            words = pipe.tokenizer.convert_ids_to_tokens([pipe.tokenizer(text).input_ids[place] for place in clip])
            assert "".join(words) == "cat</w>"


def test_a_phrase_that_is_cut_off_is_refused(pixart: Any, sd3: Any) -> None:
    late = Layout("s " * 80 + "cat", regions=(Region("cat", (0, 0, 1, 1)),))
    for name, pipe in (("pixart", pixart), ("sd3", sd3)):
        refused(pipe, name, "The phrase 'cat' comes after the first 24 tokens", layout=late)
    # CLIP reads the phrase, T5 does not: it is steered where it is read, also by an embedding of its own.
    middle = Layout("s " * 30 + "cat", regions=(Region("cat", (0, 0, 1, 1)),))
    denoiser = denoiser_of(sd3)
    with attach(sd3, middle, [RegionBias(strength=1.0), DenseModulation(end=1.0)]):
        run(FAMILIES["sd3"], sd3, middle.prompt)
    assert denoiser.same_tokens((1, 2, 78), (5, 6)) == [(1, 5), (2, 6)]
    assert denoiser.same_tokens((1, 2, 78, 79), (90, 91)) == [(78, 90), (79, 91)]
    sd3.text_encoder_3 = None
    assert max(denoiser_of(sd3).token_positions(LAYOUT)[0]) < 77


def test_a_prompt_that_pixart_rewrites_is_refused(pixart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixart, "_text_preprocessing", lambda text, clean_caption=False: ["a kitten"])
    refused(pixart, "pixart", "rewrites the prompt to 'a kitten', .* pass clean_caption=False", clean_caption=True)


def test_hidden_phrases_are_read_by_their_own_tokens_alone(sd3: Any) -> None:
    """In the text's part of joint attention: no other token's query reaches a phrase's key."""
    bound = RegionBias(strength=1.0, hide_phrases=True).bind(sd3, [LAYOUT])
    places = denoiser_of(sd3).token_positions(LAYOUT)
    bias = bound.hidden_columns(0, 77 + 24)  # type: ignore[attr-defined]
    for own in places:
        column = bias[:, list(own)]
        others = [row for row in range(len(bias)) if row not in own]
        assert not column[list(own)].any() and (column[others] < -1e3).all()
    rest = [place for place in range(len(bias)) if not any(place in own for own in places)]
    assert not bias[:, rest].any()
    dense = DenseModulation(hide_phrases=True, w_cross=0.0, end=1.0)
    with attach(sd3, LAYOUT, dense):
        found = run(FAMILIES["sd3"], sd3)
    assert (found - run(FAMILIES["sd3"], sd3)).abs().max() > 1e-4


class _Deaf(AttnProcessor2_0):
    """Drops the bias that it is given, but not the mask of padding."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None and attention_mask.shape[-2] > 1:
            least = attention_mask.amin(dim=-2, keepdim=True)
            attention_mask = least * (least < -1e3)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def test_a_processor_that_ignores_the_bias_is_found_beside_padding(pixart: Any) -> None:
    pixart.transformer.set_attn_processor(_Deaf())
    refused(pixart, "pixart", "The attention processor _Deaf ignores the attention mask")


def test_weights_of_descriptions_can_be_optimised_on_pixart(pixart: Any) -> None:
    """The differentiable steps are the pipeline's, and the weights get gradients."""
    set_scheduler(pixart, "ddim")
    weights = torch.full((2, 2), 0.5, requires_grad=True)
    with attach(pixart, LAYOUT, SpaceTimeAttention(weights=weights)), torch.enable_grad():
        conditioning = denoiser_of(pixart).condition(PROMPT, (SIDE, SIDE), 4.0, None)
        found = sample_latents(pixart, conditioning, latents_of(pixart), 2)
        found.square().sum().backward()
    assert weights.grad is not None and (weights.grad[0].abs() > 0).all()  # the last of these steps is at t = 0
    with attach(pixart, LAYOUT, SpaceTimeAttention(weights=weights.detach())):
        expected = run(FAMILIES["pixart"], pixart)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
