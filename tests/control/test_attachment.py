"""Attention under control on whole pipelines: composition, rows, schedulers, threads, and no trace left."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attachment_helpers import (
    LAYOUT,
    METHODS,
    OTHER,
    PROMPT,
    Watch,
    assert_same_draw,
    draw,
    noise,
    processors,
    shift_rows,
)
from conftest import TEXT_WIDTH
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import BoundControl, CallContext, Control
from localctl.control.dense import DenseModulation
from localctl.control.image_controls import LocalAdapterControl
from localctl.control.latents import outer_step, sigma_at
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.processor import SteeredProcessor
from localctl.control.region_bias import RegionBias
from localctl.denoisers import denoiser_of
from localctl.layout import Layout, Region
from localctl.pipelines import SCHEDULERS, set_scheduler


@pytest.mark.parametrize("method", ["bias", "dense"])
@pytest.mark.parametrize(("kind", "guidance"), [("sd_pipe", 1.0), ("v_pipe", 7.5), ("sdxl_pipe", 7.5)])
def test_each_method_moves_attention_into_the_regions(
    kind: str, guidance: float, method: str, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(kind)
    pipe.scheduler.register_to_config(timestep_spacing="trailing")  # starts at t = 999, where methods are strongest
    before, after = AttentionMaps(end=0.5), AttentionMaps(end=0.5)
    with attach(pipe, LAYOUT, before):
        plain = draw(pipe, guidance_scale=guidance)
    assert torch.equal(plain, draw(pipe, guidance_scale=guidance))  # observing changes nothing
    with attach(pipe, LAYOUT, [METHODS[method](), after]):
        steered = draw(pipe, guidance_scale=guidance)
    assert (steered - plain).abs().max() > 1e-3
    for region in range(2):
        assert after.mass(0, region) > before.mass(0, region) + 1e-3


@pytest.mark.parametrize("control", [RegionBias(strength=0.0), DenseModulation(w_cross=0.0, w_self=0.0)])
@pytest.mark.parametrize("kind", ["sd_pipe", "sdxl_pipe"])
def test_no_effect_is_bit_equal_to_plain(kind: str, control: Control, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)
    plain = draw(pipe)
    with attach(pipe, LAYOUT, control):
        assert torch.equal(draw(pipe), plain)
    with attach(pipe, Layout(PROMPT), [RegionBias(), DenseModulation()]):
        assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("method", METHODS)
def test_rows_belong_to_their_layouts(
    method: str, sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 layouts x 2 images, 96x160 pixels, own negative prompts, against four single calls."""
    size = {"height": 96, "width": 160, "num_inference_steps": 2, "guidance_scale": 5.0}
    start = noise(4, (12, 20))
    layouts, negative = [LAYOUT, OTHER], ["x", "a"]

    def together() -> Tensor:
        with attach(sd_pipe, layouts, METHODS[method]()):
            prompts = [layout.prompt for layout in layouts]
            options = {"negative_prompt": negative, "num_images_per_prompt": 2, **size}
            return draw(sd_pipe, prompts, latents=start, **options)

    def alone(row: int) -> Tensor:
        with attach(sd_pipe, layouts[row // 2], METHODS[method]()):
            options = {"negative_prompt": negative[row // 2], **size}
            return draw(sd_pipe, layouts[row // 2].prompt, latents=start[row : row + 1], **options)

    singles = torch.cat([alone(row) for row in range(4)])
    assert_same_draw(together(), singles)
    shift_rows(monkeypatch)
    assert (together() - singles).abs().max() > 1e-3  # a wrong row would show


def test_processors_are_the_same_objects_after_every_call(sd_pipe: StableDiffusionPipeline) -> None:
    before = processors(sd_pipe)
    plain = draw(sd_pipe)
    seen: list[Any] = []
    hook = sd_pipe.unet.mid_block.register_forward_pre_hook(lambda *_: seen.append(processors(sd_pipe)))

    def same() -> bool:
        now = processors(sd_pipe)
        return list(now) == list(before) and all(now[name] is before[name] for name in before)

    with attach(sd_pipe, LAYOUT, RegionBias()), attach(sd_pipe, LAYOUT, DenseModulation()):
        draw(sd_pipe)
        assert same()  # between calls as well
    assert any(isinstance(processor, SteeredProcessor) for processor in seen[0].values())
    assert same() and torch.equal(draw(sd_pipe), plain)

    class Failing(BoundControl):
        def attends(self, context: CallContext, layer: Any) -> bool:
            return True

        def attention_bias(self, *_: Any) -> Tensor | None:
            raise self.error

    class Fails(Control):
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def bind(self, pipe: Any, layouts: Any) -> BoundControl:
            bound = Failing()
            bound.error = self.error  # type: ignore[attr-defined]
            return bound

    for error in (RuntimeError("broken"), KeyboardInterrupt()):
        with pytest.raises(type(error)), attach(sd_pipe, LAYOUT, RegionBias()), attach(sd_pipe, LAYOUT, Fails(error)):
            draw(sd_pipe)
        assert same()
    hook.remove()


def test_biases_add_up_also_in_nested_attaches(sd_pipe: StableDiffusionPipeline) -> None:
    bias, dense = RegionBias(strength=1.0), DenseModulation(end=1.0, separate_texts=False)
    with attach(sd_pipe, LAYOUT, [bias, dense]):
        together = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, bias), attach(sd_pipe, LAYOUT, dense):
        assert_same_draw(draw(sd_pipe), together)
    with attach(sd_pipe, LAYOUT, dense), attach(sd_pipe, LAYOUT, bias):
        assert_same_draw(draw(sd_pipe), together)
    halves = [RegionBias(strength=0.25), RegionBias(strength=0.75)]
    with attach(sd_pipe, LAYOUT, halves):
        twice = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, bias):
        assert_same_draw(twice, draw(sd_pipe))


@pytest.mark.parametrize("kind", [AttnProcessor, AttnProcessor2_0, lambda: SlicedAttnProcessor(1)])
def test_every_processor_is_steered_alike(kind: Any, sd_pipe: StableDiffusionPipeline) -> None:
    with attach(sd_pipe, LAYOUT, [RegionBias(strength=1.0), DenseModulation(end=1.0)]):
        expected = draw(sd_pipe)
    sd_pipe.unet.set_attn_processor(kind())
    # In parts of few queries, too.
    with attach(sd_pipe, LAYOUT, [RegionBias(strength=1.0), DenseModulation(end=1.0, memory_limit=0.005)]):
        assert_same_draw(draw(sd_pipe), expected)


def test_a_bias_for_all_heads_is_not_copied_for_each(
    sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    strides: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attn_mask is not None:
            strides.append(attn_mask.stride(1))
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    with attach(sd_pipe, LAYOUT, RegionBias()):
        draw(sd_pipe, guidance_scale=5.0)
    assert strides and set(strides) == {0}
    sites = denoiser_of(sd_pipe).attention_layers((8, 8))
    assert not any("prepare_attention_mask" in vars(attn) for _, attn in sites)


def test_fused_projections(sd_pipe: StableDiffusionPipeline) -> None:
    with attach(sd_pipe, LAYOUT, DenseModulation()):
        expected = draw(sd_pipe)
    sd_pipe.fuse_qkv_projections(vae=False)
    with attach(sd_pipe, LAYOUT, DenseModulation()):
        assert_same_draw(draw(sd_pipe), expected)
    with attach(sd_pipe, LAYOUT, DenseModulation(memory_limit=0.005)), pytest.raises(ValueError, match="unfuse_qkv"):
        draw(sd_pipe)


def test_xformers_is_refused_in_one_sentence(sd_pipe: StableDiffusionPipeline) -> None:
    class XFormersAttnProcessor(AttnProcessor):
        pass

    sd_pipe.unet.set_attn_processor(XFormersAttnProcessor())
    with attach(sd_pipe, LAYOUT, RegionBias()), pytest.raises(ValueError, match="XFormersAttnProcessor takes no"):
        draw(sd_pipe)


def test_keywords_reach_the_wrapped_processor(sd_pipe: StableDiffusionPipeline) -> None:
    class Own(AttnProcessor2_0):
        def __call__(
            self, attn: Any, hidden_states: Tensor, *args: Any, loudness: float = 1.0, **kwargs: Any
        ) -> Tensor:
            return super().__call__(attn, hidden_states, *args, **kwargs) * loudness

    sd_pipe.unet.set_attn_processor(Own())
    with attach(sd_pipe, LAYOUT, RegionBias()):
        loud = draw(sd_pipe, cross_attention_kwargs={"loudness": 2.0})
        assert (loud - draw(sd_pipe)).abs().max() > 1e-3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sigma_is_the_noise_level_of_the_sample(name: str, sd_pipe: StableDiffusionPipeline) -> None:
    """A sample in noise of level sigma is, scaled for the model, divided by sqrt(sigma^2 + 1)."""
    set_scheduler(sd_pipe, name)
    seen: list[tuple[int, int, float]] = []
    with attach(sd_pipe, LAYOUT, Watch(seen)):
        draw(sd_pipe, num_inference_steps=5)
    sigmas = [item[2] for item in seen]
    assert all(0.01 < sigma < 15 for sigma in sigmas)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(sigmas)) or name == "pndm"
    scheduler = sd_pipe.scheduler
    abar = scheduler.alphas_cumprod.double()
    levels = ((1 - abar) / abar).sqrt()
    for time in scheduler.timesteps.tolist():
        near = float(levels[min(999, max(0, round(time)))])
        assert sigma_at(scheduler, time) == pytest.approx(near, rel=0.05)  # times between steps are rounded here


def looker(seen: dict[str, int], name: str) -> Callable[..., None]:
    """A hook that records how many cells an attention layer receives."""
    return lambda module, args, kwargs: seen.update({name: args[0].shape[1]})


def test_sites_know_their_cells(sd_pipe: StableDiffusionPipeline, sdxl_pipe: StableDiffusionXLPipeline) -> None:
    for pipe in (sd_pipe, sdxl_pipe):
        for size in ((8, 8), (9, 11), (12, 20)):
            found = denoiser_of(pipe).attention_layers(size)
            seen: dict[str, int] = {}
            hooks = [
                attn.register_forward_pre_hook(looker(seen, layer.name), with_kwargs=True) for layer, attn in found
            ]
            draw(pipe, latents=noise(1, size), height=8 * size[0], width=8 * size[1], num_inference_steps=1)
            for hook in hooks:
                hook.remove()
            assert seen == {layer.name: layer.cells for layer, _ in found}
            assert {f"{name}.processor" for name in seen} == set(pipe.unet.attn_processors)
            assert all(layer.cross == layer.name.endswith("attn2") for layer, _ in found)


def test_another_thread_is_refused(sd_pipe: StableDiffusionPipeline) -> None:
    caught: list[BaseException] = []

    def elsewhere(action: Callable[[], Any]) -> str:
        def run() -> None:
            try:
                action()
            except ValueError as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return str(caught.pop()) if caught else "done"

    def attach_and_draw() -> None:
        with attach(sd_pipe, LAYOUT, RegionBias()):
            draw(sd_pipe)

    with attach(sd_pipe, LAYOUT, RegionBias()):
        assert "Another thread has attached controls" in elsewhere(attach_and_draw)
        assert "from another thread" in elsewhere(lambda: draw(sd_pipe))
        draw(sd_pipe)
        messages: list[str] = []

        def interfere(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
            text = torch.zeros(1, 7, TEXT_WIDTH)
            messages.append(elsewhere(lambda: sd_pipe.unet(noise(1), 5, text)))
            return tensors

        draw(sd_pipe, callback_on_step_end=interfere)
        assert all("while it is steered" in message for message in messages) and len(messages) == 2
    assert elsewhere(attach_and_draw) == "done"


def test_what_is_no_control_is_named(sd_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="'bias' is not a control"), attach(sd_pipe, LAYOUT, ["bias"]):  # type: ignore
        pass
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        Layout("a cat", regions=(Region("dog", (0, 0, 1, 1)),))
    with attach(sd_pipe, LAYOUT, RegionBias()), pytest.raises(ValueError, match="prompt 'a dog' but the attached"):
        draw(sd_pipe, "a dog")


def test_refusals_come_before_the_first_step(
    sd_pipe: StableDiffusionPipeline, make_adapter: Callable[..., LocalAdapter]
) -> None:
    ran: list[Any] = []
    sd_pipe.unet.conv_in.register_forward_pre_hook(lambda *_: ran.append(1))
    wide = Layout(PROMPT, 64, 128, LAYOUT.regions)
    large = LocalAdapterControl(make_adapter(), torch.zeros(1, 128, 128), torch.ones(1, 128, 128))
    cases: list[tuple[Layout, Control, Any, str]] = [
        (LAYOUT, RegionBias(), "a dog", "call it with layout.prompt"),
        (LAYOUT, RegionBias(), [PROMPT, PROMPT, "x"], "call it with layout.prompt"),
        (wide, RegionBias(), PROMPT, "generates 64x64 pixels but the layout is 128x64"),
        (LAYOUT, large, PROMPT, "condition is 128x128 pixels but the image is 64x64"),
        (LAYOUT, LayoutGuidance(sites=("up/16",)), PROMPT, "no cross-attention at 'up/16'"),
        (Layout("a", regions=(Region("a", (0, 0, 1, 1), strength=2.0),)), DenseModulation(), "a", "must lie in"),
    ]
    for layout, control, prompt, message in cases:
        count = 1 if isinstance(prompt, str) else len(prompt)
        with pytest.raises(ValueError, match=re.escape(message)) as caught, attach(sd_pipe, layout, control):
            draw(sd_pipe, prompt, count)
        assert "\n" not in str(caught.value) and not ran


def test_outer_step_of_two_modules_is_one() -> None:
    from localctl.sampling import outer_step as public

    assert public is outer_step


def test_another_text_for_the_second_encoder_is_refused_where_phrases_are_located(sdxl_pipe: Any) -> None:
    with attach(sdxl_pipe, LAYOUT, RegionBias(strength=1.0)):
        with pytest.raises(ValueError, match="Phrases are found in the layout's prompt, .* 'dogs'; leave prompt_2 out"):
            draw(sdxl_pipe, prompt_2="dogs")
        same = draw(sdxl_pipe, prompt_2=PROMPT)
        assert torch.equal(same, draw(sdxl_pipe))
    with attach(sdxl_pipe, PROMPT, Watch([])):  # which looks at no phrase
        draw(sdxl_pipe, prompt_2="dogs")
