"""FLUX, Qwen-Image and Z-Image: guidance by two calls, texts of any length within templates, backends of attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from families import FAMILIES, PROMPT, SIDE, frozen, latents_of, run, token_adapter
from PIL import Image
from torch import Tensor

from localctl.bases import TRANSFORMER_PIPELINES
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.denoisers import denoiser_of
from localctl.denoisers.joint import dispatched
from localctl.image_to_image import InitImage
from localctl.layout import Layout, Region
from localctl.pipelines import load_pipeline, set_scheduler
from localctl.sampling import generate

pytest_plugins = ["families"]
LAYOUT = Layout(PROMPT, regions=(Region("Cat", (0, 0, 0.5, 1), negative_prompt="x"), Region("dogs", (0.5, 0, 1, 1))))
LONG = PROMPT + " s" * 20  # of more tokens than 32
NAMES = ("flux", "flux2", "qwen_image", "z_image")
_LOADED: dict[str, Any] = {}


@pytest.fixture
def load(family_folders: Callable[[str], Any]) -> Callable[[str], Any]:
    def loaded(name: str) -> Any:
        if name not in _LOADED:
            _LOADED[name] = frozen(diffusers.DiffusionPipeline.from_pretrained(family_folders(name)))
        return copy.deepcopy(_LOADED[name])

    return loaded


def refused(pipe: Any, name: str, match: str, **options: Any) -> None:
    layout = options.pop("layout", LAYOUT)
    calls: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=match), attach(pipe, layout, RegionBias(strength=1.0)):
        run(FAMILIES[name], pipe, layout.prompt, **options)
    hook.remove()
    assert not calls


def outputs_of(pipe: Any, call: Callable[[], Any]) -> list[Tensor]:
    """Return what the transformer returns for the first row in each call."""
    seen: list[Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0][:1].clone()))
    call()
    hook.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "start"),
    [("flux", "noise"), ("flux2", "noise"), ("qwen_image", "noise"), ("flux", "image"), ("qwen_image", "image")],
)
def test_the_negative_prompt_s_call_is_not_biased(load: Any, name: str, start: str) -> None:
    """FLUX's pipelines that start from an image do not name their calls."""
    pipe, family = load(name), FAMILIES[name]
    image = Image.fromarray(np.arange(SIDE * SIDE * 3).astype(np.uint8).reshape(SIDE, SIDE, 3))
    init = InitImage(image, 0.5) if start == "image" else None

    def call(*controls: Any) -> None:
        options = {**family.call, **family.guided, "num_inference_steps": 2, "output_type": "latent", "init": init}
        size: dict[str, Any] = {} if init else {"height": SIDE, "width": SIDE}
        generate(pipe, LAYOUT, controls, seeds=1, **options, **size)

    plain = outputs_of(pipe, call)[:2]
    biased = outputs_of(pipe, lambda: call(RegionBias(strength=1.0)))[:2]
    avoiding = outputs_of(pipe, lambda: call(NegativePrompts()))[:2]
    assert torch.equal(biased[1], plain[1]) and (biased[0] - plain[0]).abs().max() > 1e-4
    assert torch.equal(avoiding[0], plain[0]) and (avoiding[1] - plain[1]).abs().max() > 1e-4


def test_a_call_without_negative_prompt_is_one_call_a_step(load: Any) -> None:
    """Also after one with it, and after texts that were encoded in between."""
    pipe, family = load("flux"), FAMILIES["flux"]
    with attach(pipe, LAYOUT, RegionBias(strength=1.0)):
        run(family, pipe)
        pipe.encode_prompt(PROMPT, max_sequence_length=24)
        distilled = outputs_of(pipe, lambda: run(family, pipe, guided=False))
    plain = outputs_of(pipe, lambda: run(family, pipe, guided=False))
    assert len(distilled) == len(plain) == 2
    assert all((one - other).abs().max() > 1e-4 for one, other in zip(distilled, plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_that_takes_no_noise_levels_is_refused(load: Any, name: str) -> None:
    pipe = load(name)
    with pytest.raises(ValueError, match="which the scheduler heun is not for; .* choose one of euler, lcm"):
        set_scheduler(pipe, "heun")
    with pytest.raises(ValueError, match="FlowMatchLCMScheduler samples noise between the steps that the seeds cannot"):
        generate(pipe, LAYOUT, [], seeds=1, scheduler="lcm", height=SIDE, width=SIDE)
    set_scheduler(pipe, "lcm")
    assert run(FAMILIES[name], pipe).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_negative_prompts_of_regions_need_one_of_the_call(load: Any, name: str) -> None:
    pipe = load(name)
    with pytest.raises(ValueError, match="this call with the .* has none"), attach(pipe, LAYOUT, NegativePrompts()):
        run(FAMILIES[name], pipe, guided=False)


def test_z_image_may_leave_the_negative_prompt_out_in_some_steps(load: Any) -> None:
    pipe = load("z_image")
    with attach(pipe, LAYOUT, NegativePrompts()):
        found = run(FAMILIES["z_image"], pipe, cfg_truncation=0.4)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_texts_of_other_lengths_are_mixed_in_and_masked(load: Any, name: str) -> None:
    """Shorter and longer than the prompt, whose negative prompt is shorter, in a batch with a shorter prompt."""
    pipe, family = load(name), FAMILIES[name]
    long, short = (
        Layout(text, regions=(Region("Cat", (0, 0, 1, 1), prompt=other),))
        for text, other in ((LONG, "s dog, a dog"), ("A Cat, s", LONG + " s, dog s, dogs, dogs"))
    )
    prompts, size = [LONG, "A Cat, s"], {"height": 64, "width": 128}  # 32 tokens: Z-Image's are not filled up
    options = {
        **size,
        "latents": latents_of(pipe, 2, (64, 128)),
        **({"max_sequence_length": 96} if name == "z_image" else {}),
    }
    plain = run(family, pipe, prompts, **options)
    with attach(pipe, [long, short], AttentionMaps()):
        assert torch.equal(run(family, pipe, prompts, **options), plain)
    with attach(pipe, [long, short], SpaceTimeAttention(weight=1.0)):
        found = run(family, pipe, prompts, **options)
    for row, layout in enumerate((long, short)):
        texts = family.embeds(pipe, layout.regions[0].prompt or "", "", family.guided.get("negative_prompt", ""))
        alone = {**options, "latents": latents_of(pipe, 2, (64, 128))[row : row + 1]}
        expected = run(family, pipe, None, **{**alone, **texts})
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_backends_that_take_no_bias_are_refused_before_the_first_step(
    load: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(name)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)  # it is set, too
    pipe.transformer.set_attention_backend("_native_flash")
    refused(pipe, name, r"by the backend _native_flash, which takes no bias .*\.set_attention_backend\('native'\)")
    pipe.transformer.set_attention_backend("native")
    with attach(pipe, LAYOUT, RegionBias(strength=1.0)):
        run(FAMILIES[name], pipe)
    pipe.transformer.reset_attention_backend()
    with attention_backend("_native_flash"):
        refused(pipe, name, "by the backend _native_flash, which takes no bias")
    attn = denoiser_of(pipe).attention_layers((4, 4))[1][1]
    attn.processor._parallel_config = SimpleNamespace()
    refused(pipe, name, "has its tokens on several devices")
    attn.processor = torch.nn.Identity()
    refused(pipe, name, "has a Identity, which takes no attention bias from controls; load the base without it")


def test_what_flux_ignores_or_shares_is_refused(load: Any) -> None:
    pipe = load("flux")
    masks = {"ip_adapter_masks": [torch.ones(1, 1, SIDE, SIDE)]}
    refused(pipe, "flux", "FLUX ignores ip_adapter_masks in joint_attention_kwargs", joint_attention_kwargs=masks)
    shared = {"attention_mask": torch.zeros(1, 1, 1, 1)}
    refused(pipe, "flux", "shares between prompt and negative prompt attention_mask", joint_attention_kwargs=shared)
    refused(pipe, "flux", "the second text encoder would read 'dogs'; leave prompt_2 out", prompt_2="dogs")
    pipe._joint_attention_kwargs = None
    denoiser: Any = denoiser_of(pipe)
    ids = pipe._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32)
    with pytest.raises(ValueError, match="with tokens of further images"):
        denoiser.read((), {"img_ids": torch.cat([ids, ids]), **dict.fromkeys(denoiser.order[:4], torch.zeros(1))})
    wide, high = (pipe._prepare_latent_image_ids(1, *size, "cpu", torch.float32) for size in ((1, 2), (2, 1)))
    high[:, 0] = 1  # as many tokens as an image of 2 x 2 has
    with pytest.raises(ValueError, match="with tokens of further images"):
        denoiser.grid_of(((*[torch.zeros(1)] * 4, torch.cat([wide, high])), {}))
    with pytest.raises(ValueError, match="FLUX's own guidance is distilled"):
        denoiser.condition("a cat", (SIDE, SIDE), 3.5, "dogs")


def test_what_qwen_and_z_image_cannot_do_is_refused(load: Any) -> None:
    qwen, other = load("qwen_image"), load("z_image")
    refused(qwen, "qwen_image", "ignores guidance_scale; pass true_cfg_scale", guidance_scale=4.0)
    with pytest.raises(ValueError, match="with tokens of further images"):
        denoiser_of(qwen).grid_of(((), {"img_shapes": [[(1, 2, 2), (1, 2, 2)]]}))  # type: ignore[attr-defined]
    texts = FAMILIES["z_image"].embeds(other, PROMPT, "", "")
    with (
        pytest.raises(ValueError, match="called with prompt embeddings alone"),
        attach(other, LAYOUT, RegionBias(strength=1.0)),
    ):
        run(FAMILIES["z_image"], other, None, **texts)
    with pytest.raises(ValueError, match="called with further images"):
        denoiser_of(other).read(([[torch.zeros(4, 1, 4, 4)]], torch.zeros(1), []), {})


def test_weights_in_the_second_call_s_negative_prompt_are_refused(load: Any) -> None:
    refused(load("flux"), "flux", r"The prompt '\(x:1.3\)' has weights, which acts on", negative_prompt="(x:1.3)")


def test_copies_of_a_prompt_are_no_guidance(load: Any) -> None:
    """Z-Image's pipeline copies prompts after their encoding: two rows may be two images, or one with guidance."""
    pipe, family = load("z_image"), FAMILIES["z_image"]
    with attach(pipe, LAYOUT, RegionBias(strength=1.0)):
        both = run(family, pipe, count=2, guided=False, num_images_per_prompt=2)
        alone = run(family, pipe, guided=False, latents=latents_of(pipe, 2)[1:])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_phrases_are_found_within_the_template(load: Any, name: str) -> None:
    """At the places of the embeddings that the layers get."""
    pipe = load(name)
    for prompt in ("A Cat, dogs", "Cat", "user Cat", "  A   Cat,  DOGS ", "the xx, a\nCat,dogs of"):
        layout = Layout(prompt, regions=(Region("Cat", (0, 0, 1, 1)),))
        (places,) = denoiser_of(pipe).token_positions(layout)
        if name == "flux":
            tokenizer, text, dropped = pipe.tokenizer_2, prompt, 0
        elif name == "qwen_image":
            tokenizer, text, dropped = pipe.tokenizer, pipe.prompt_template_encode.format(prompt), 34
        else:
            messages = [{"role": "user", "content": prompt}]
            tokenizer, dropped = pipe.tokenizer, 0
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text).input_ids[dropped:]
        found = "".join(tokenizer.convert_ids_to_tokens([ids[place] for place in places]))
        assert found.replace("▁", "").replace("<unk>", "C") == "Cat"
        if "flux" not in name:
            assert len(pipe.encode_prompt(prompt)[0][0]) == len(ids)


def test_the_tiny_template_has_as_many_tokens_as_the_real_one(load: Any) -> None:
    pipe = load("qwen_image")
    before, after = pipe.prompt_template_encode.split("{}")
    assert len(pipe.tokenizer(before).input_ids) == pipe.prompt_template_encode_start_idx == 34
    assert len(pipe.tokenizer(after).input_ids) == 5


def test_a_template_that_changes_the_prompt_is_refused(load: Any) -> None:
    pipe = load("z_image")
    template = pipe.tokenizer.chat_template
    pipe.tokenizer.chat_template = template.replace("message.content", "message.content | trim")
    with pytest.raises(ValueError, match="chat template changes the prompt ' Cat '; give it without blanks"):
        denoiser_of(pipe).token_positions(Layout(" Cat ", regions=(Region("Cat", (0, 0, 1, 1)),)))


@pytest.mark.parametrize("name", NAMES)
def test_a_phrase_that_the_call_cuts_off_is_refused(load: Any, name: str) -> None:
    late = Layout("s " * 30 + "cat", regions=(Region("cat", (0, 0, 1, 1)),))
    refused(load(name), name, "The phrase 'cat' comes after the first 24 tokens", layout=late, max_sequence_length=24)


def test_an_image_prompt_of_flux_is_left_to_its_processor() -> None:
    """The first attention that it dispatches is steered, not that to the image."""
    torch.manual_seed(0)
    attn = diffusers.models.transformers.transformer_flux.FluxAttention(
        16, heads=2, dim_head=8, added_kv_proj_dim=16, bias=True, context_pre_only=False, out_dim=16
    )
    processor = FluxIPAdapterAttnProcessor(16, 16)
    image, text, prompt = torch.randn(3, 2, 4, 16).unbind()
    seen: list[tuple[int, ...]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, stock: Any) -> Tensor:
        seen.append(tuple(key.shape))
        return stock(query, key, value, mask)

    expected = processor(attn, image, text, ip_hidden_states=[prompt])
    found = dispatched(processor, attend, attn, image, text, ip_hidden_states=[prompt])
    assert seen == [(2, 2, 8, 8)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_loads_as_a_base(family_folders: Callable[[str], Any], name: str) -> None:
    pipe = load_pipeline(str(family_folders(name)))
    assert type(pipe).__name__ in TRANSFORMER_PIPELINES and denoiser_of(pipe).own_size == (1024, 1024)


@pytest.mark.parametrize("name", NAMES)
def test_each_step_shows_unpacked_latents(load: Any, name: str) -> None:
    shown: list[Any] = []
    pipe, family = load(name), FAMILIES[name]
    size = {"height": SIDE, "width": 2 * SIDE}
    options = {**family.call, "num_inference_steps": 2, "output_type": "latent", **size}
    images = generate(pipe, LAYOUT, [], seeds=[1, 2], on_step=shown.append, **options).images
    assert [step.latents.shape for step in shown] == [(2, 4, 4, 8)] * 2
    denoiser = denoiser_of(pipe)
    last = torch.stack(list(images))
    last = denoiser.unpacked(last, (SIDE, 2 * SIDE)) if name != "flux2" else last  # whose pipeline unpacks them
    torch.testing.assert_close(last, shown[-1].latents, rtol=0, atol=1e-3)
    assert torch.equal(denoiser.unpacked(denoiser.packed(last), (SIDE, 2 * SIDE)), last)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_output_is_that_of_the_pipeline_s_call(load: Any, name: str) -> None:
    """For training: packed, signed and timed as the pipeline does it."""
    pipe, family = load(name), FAMILIES[name]
    denoiser: Any = denoiser_of(pipe)
    noise, seen, step = latents_of(pipe), [], pipe.scheduler.step

    def noting(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(output.clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = noting
    long = {"max_sequence_length": 512} if "flux" in name else {}
    run(family, pipe, guided=False, num_inference_steps=1, **long)
    del pipe.scheduler.step
    conditioning = denoiser.condition(PROMPT, (SIDE, SIDE), 3.5 if name == "flux" else 0.0, None)
    noisy = denoiser.unpacked(noise if name != "flux2" else noise.flatten(2).mT, (SIDE, SIDE))
    found = denoiser.output(noisy, pipe.scheduler.timesteps[:1], conditioning)
    expected = denoiser.unpacked(seen[0], (SIDE, SIDE))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    adapter = token_adapter(pipe)
    features = adapter(torch.rand(1, 2, SIDE, SIDE))
    assert (denoiser.output(noisy, pipe.scheduler.timesteps[:1], conditioning, features) - found).abs().max() > 1e-4
