"""Which rows get an adapter's features, and the guidance scale of a control's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import control_helpers
import families
import pytest
import torch
from attachment_helpers import METHODS, OTHER, PROMPT, adapter_control, assert_same_draw, draw, noise, processors
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from families import Family
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.base import Control
from localctl.control.image_controls import LocalAdapterControl
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.spacetime import SpaceTimeAttention
from localctl.denoisers import denoiser_of
from localctl.denoisers.unet import UNet
from localctl.layout import Layout, Region

pytest_plugins = ["families"]
MakeAdapter = Callable[..., LocalAdapter]
REGIONS = Layout(PROMPT, regions=(Region("cat", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0.25, 1, 1))))


def drawn(pipe: DiffusionPipeline, controls: Control | list[Control], layout: Any = PROMPT, **options: Any) -> Tensor:
    with attach(pipe, layout, controls):
        return draw(pipe, **{"guidance_scale": 3.0, **options})


def model_output(pipe: Any, controls: Control | list[Control], guidance_scale: float = 3.0) -> Tensor:
    """The model output after guidance, at the first step."""
    found: list[Tensor] = []
    original = pipe.scheduler.step

    def step(output: Tensor, *args: Any, **options: Any) -> Any:
        found.append(output)
        return original(output, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", step)
        drawn(pipe, controls, guidance_scale=guidance_scale)
    return found[0]


def test_at_scale_one_nothing_changes_and_at_zero_the_negative_rows_have_no_features(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    where = control_helpers.context(layout_of_row=(0, 0), conditional=(False, True))
    found = {}
    for scale in (1.0, 0.25, 0.0):
        bound = adapter_control(make_adapter(), unconditional_scale=scale).bind(sd_pipe, [Layout("a")])
        found[scale] = bound.down_residuals(where)
    for whole, quarter, none in zip(*found.values(), strict=True):
        assert torch.equal(quarter[0], 0.25 * whole[0]) and not none[0].any()
        assert torch.equal(quarter[1], whole[1]) and torch.equal(none[1], whole[1])
    adapter = make_adapter()
    plain = drawn(sd_pipe, adapter_control(adapter))
    assert torch.equal(drawn(sd_pipe, adapter_control(adapter, unconditional_scale=1)), plain)
    assert not torch.equal(drawn(sd_pipe, adapter_control(adapter, unconditional_scale=0)), plain)


def test_an_adapter_has_a_scale_of_its_own_where_there_is_guidance(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    make_adapter(unconditional_scale=0.0).save_pretrained(tmp_path)
    adapter, plain = LocalAdapter.from_pretrained(tmp_path), make_adapter()
    alone = drawn(sd_pipe, adapter_control(plain, unconditional_scale=0))
    assert torch.equal(drawn(sd_pipe, adapter_control(adapter)), alone)
    whole = drawn(sd_pipe, adapter_control(plain))
    assert torch.equal(drawn(sd_pipe, adapter_control(adapter, unconditional_scale=1)), whole)
    assert not torch.equal(alone, whole)
    # without guidance it has no effect, and nothing is refused
    unguided = drawn(sd_pipe, adapter_control(plain), guidance_scale=1.0)
    assert torch.equal(drawn(sd_pipe, adapter_control(adapter), guidance_scale=1.0), unguided)
    own = drawn(sd_pipe, adapter_control(plain, guidance_scale=2.0))
    assert torch.equal(drawn(sd_pipe, adapter_control(adapter, guidance_scale=2.0)), own)
    with pytest.raises(ValueError, match="unconditional_scale must be a finite number, not nan"):
        make_adapter(unconditional_scale=float("nan"))


@pytest.mark.parametrize("kind", ["sd_pipe", "v_pipe", "sdxl_pipe"])
def test_guidance_of_its_own_is_the_sum_of_three_model_outputs(
    kind: str, make_adapter: MakeAdapter, xl_adapter: LocalAdapter, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(kind)
    adapter = xl_adapter if kind == "sdxl_pipe" else make_adapter()
    g, c = 3.0, 1.75

    def output(**options: Any) -> Tensor:
        return model_output(pipe, adapter_control(adapter, **options))

    without = model_output(pipe, [])  # negative + g (prompt - negative)
    whole = output(unconditional_scale=0)  # negative + g (control - negative)
    expected = without + c / g * (whole - without)
    assert_same_draw(output(guidance_scale=c), expected, calls=3)
    assert not torch.allclose(expected, whole, rtol=0.01)
    assert_same_draw(output(guidance_scale=5.0), without + 5 / g * (whole - without), calls=6)


def test_it_reduces_to_the_usual_guidance(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    adapter = make_adapter()
    calls: list[int] = []
    hook = sd_pipe.unet.conv_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))

    def images(**options: Any) -> Tensor:
        calls.clear()
        return drawn(sd_pipe, adapter_control(adapter, **options))

    only_prompt = images(unconditional_scale=0)
    assert torch.equal(images(guidance_scale=3.0), only_prompt) and calls == [2, 2]  # as the pipeline's
    base = drawn(sd_pipe, [])
    item = adapter_control(adapter, guidance_scale=0.0)
    assert torch.equal(drawn(sd_pipe, item), base)
    item.guidance_scale = 2.0
    assert not torch.equal(drawn(sd_pipe, item), only_prompt) and calls[-2:] == [1, 2]
    # without classifier-free guidance, 1 is the usual
    item.guidance_scale = 1.0
    plain = drawn(sd_pipe, adapter_control(adapter), guidance_scale=1.0)
    assert torch.equal(drawn(sd_pipe, item, guidance_scale=1.0), plain)
    item.guidance_scale = 2.0
    assert not torch.equal(drawn(sd_pipe, item, guidance_scale=1.0), plain)
    hook.remove()


def test_an_image_does_not_depend_on_its_batch_and_nothing_remains(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    before = processors(sd_pipe)
    layouts, adapter = [REGIONS, OTHER], make_adapter()
    latents = noise(2)

    def controls(some: slice) -> list[Control]:
        item = adapter_control(adapter, layouts=2, guidance_scale=4.0)
        item.condition = item.condition[some]
        return [item, METHODS["bias"]()]

    def of(some: slice) -> Tensor:
        chosen = layouts[some]
        with attach(sd_pipe, chosen, controls(some)):
            prompts = [layout.prompt for layout in chosen]
            return draw(sd_pipe, prompts, guidance_scale=3.0, latents=latents[some])

    together = of(slice(0, 2))
    for index in range(2):
        assert_same_draw(of(slice(index, index + 1)), together[index : index + 1], calls=6)
    assert processors(sd_pipe) == before and not sd_pipe.unet._forward_hooks and not sd_pipe.unet._forward_pre_hooks
    assert torch.equal(drawn(sd_pipe, []), draw(sd_pipe, guidance_scale=3.0))


@pytest.mark.parametrize("method", ["bias", "dense", "spacetime", "guidance"])
def test_region_controls_steer_the_run_without_features_too(
    method: str, make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    controls: dict[str, Callable[[], Control]] = {**METHODS, "guidance": lambda: LayoutGuidance(end=1.0)}
    controls["spacetime"] = lambda: SpaceTimeAttention(weight=0.8)
    adapter = make_adapter()

    def images(**options: Any) -> Tensor:
        return drawn(sd_pipe, [controls[method](), adapter_control(adapter, **options)], REGIONS)

    # an adapter without effect: both runs are those with the region control alone
    alone = drawn(sd_pipe, [controls[method]()], REGIONS)
    assert_same_draw(images(weight=0.0, guidance_scale=2.0), alone, calls=6)
    assert not torch.allclose(alone, drawn(sd_pipe, []), rtol=1e-3)  # which has one
    assert not torch.allclose(images(guidance_scale=2.0), images(guidance_scale=4.0), rtol=1e-3)


def test_windows_and_two_adapters(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    adapter = make_adapter()
    first = adapter_control(adapter, guidance_scale=2.0, end=0.5)
    halves = [first, adapter_control(adapter, guidance_scale=2.0, start=0.5)]
    assert_same_draw(drawn(sd_pipe, halves), drawn(sd_pipe, adapter_control(adapter, guidance_scale=2.0)), calls=6)
    halves = [adapter_control(adapter, weight=0.5, guidance_scale=2.0) for _ in range(2)]
    assert_same_draw(drawn(sd_pipe, halves), drawn(sd_pipe, adapter_control(adapter, guidance_scale=2.0)), calls=6)


def test_what_has_no_effect_or_no_meaning_is_refused(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    adapter = make_adapter()
    with pytest.raises(ValueError, match=r"unconditional_scale=0.5 has no meaning"):
        adapter_control(adapter, unconditional_scale=0.5, guidance_scale=2.0)
    for name in ("unconditional_scale", "guidance_scale"):
        with pytest.raises(ValueError, match=f"{name} of a control must be a finite number, not nan"):
            adapter_control(adapter, **{name: float("nan")})
    with pytest.raises(ValueError, match="unconditional_scale=0 acts on the rows of the negative prompt, but without"):
        drawn(sd_pipe, adapter_control(adapter, unconditional_scale=0), guidance_scale=1.0)
    two = [adapter_control(adapter, guidance_scale=scale) for scale in (2.0, 3.0)]
    with pytest.raises(ValueError, match="of their own, 2 and 3; give all of them one"), attach(sd_pipe, PROMPT, two):
        pass
    with attach(sd_pipe, PROMPT, two[0]), pytest.raises(ValueError, match="give all controls to one attach"):
        drawn(sd_pipe, adapter_control(adapter))
    with attach(sd_pipe, PROMPT, adapter_control(adapter)):  # the other way round each is applied
        assert not torch.allclose(drawn(sd_pipe, two[0]), draw(sd_pipe, guidance_scale=3.0), rtol=1e-3)


def test_transformers_take_part_alike(family: Family, dit: Any) -> None:
    adapter = families.token_adapter(dit)
    torch.manual_seed(0)
    condition, mask = torch.rand(1, families.SIDE, families.SIDE), torch.ones(1, families.SIDE, families.SIDE)

    def images(**options: Any) -> Tensor:
        with attach(dit, families.PROMPT, LocalAdapterControl(adapter, condition, mask, **options)):
            return families.run(family, dit)

    alone = images(unconditional_scale=0)
    assert not torch.equal(images(), alone)
    if family.name == "pixart":
        with pytest.raises(ValueError, match="PixArtSigmaPipeline has no guidance_scale, so a control cannot have"):
            images(guidance_scale=4.0)
        return
    if not denoiser_of(dit).guides_in_one_call:
        with pytest.raises(ValueError, match="no control can have a guidance scale of its own; leave it out"):
            images(guidance_scale=4.0)
        return
    assert torch.equal(images(guidance_scale=4.0), alone)
    assert torch.equal(images(guidance_scale=0), families.run(family, dit))
    weaker, stronger = images(guidance_scale=2.0), images(guidance_scale=8.0)
    assert not torch.allclose(weaker, alone, rtol=1e-3) and not torch.allclose(stronger, alone, rtol=1e-3)


def test_where_guidance_is_two_calls_it_is_refused(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet, "guides_in_one_call", False)
    drawn(sd_pipe, adapter_control(make_adapter(), unconditional_scale=0))
    with pytest.raises(ValueError, match="from one call for both, so no control can have a guidance scale"):
        drawn(sd_pipe, adapter_control(make_adapter(), guidance_scale=2.0))
