from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attachment_helpers
import pytest
import torch
from attachment_helpers import adapter_control as control
from attachment_helpers import noise, shift_rows
from diffusers import (
    DiffusionPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.image_controls import LocalAdapterControl
from localctl.layout import Layout
from localctl.pipelines import SCHEDULERS, set_scheduler
from localctl.sampling import attach, outer_step

MakeAdapter = Callable[..., LocalAdapter]
PIPES = ("sd_pipe", "v_pipe", "sdxl_pipe")


def draw(pipe: DiffusionPipeline, prompt: Any = "a b", count: int = 1, **options: Any) -> Tensor:
    """Latents (count, 4, 8, 8) after few steps from fixed noise."""
    return attachment_helpers.draw(pipe, prompt, count, **{"num_inference_steps": 3, **options})


@contextmanager
def watched(pipe: DiffusionPipeline) -> Iterator[list[list[Tensor] | None]]:
    """What each call of the U-Net got as residuals; None for nothing. Enter it after attaching."""
    seen: list[list[Tensor] | None] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("down_intrablock_additional_residuals")
        seen.append(None if given is None else list(given))

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def adapter_for(pipe: DiffusionPipeline, make_adapter: MakeAdapter, xl_adapter: LocalAdapter) -> LocalAdapter:
    return xl_adapter if isinstance(pipe, StableDiffusionXLPipeline) else make_adapter()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", PIPES)
def test_full_mask_is_the_adapter_pipeline_of_diffusers(
    kind: str, guidance: float, make_adapter: MakeAdapter, xl_adapter: LocalAdapter, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(kind)
    adapter = adapter_for(pipe, make_adapter, xl_adapter)
    item = control(adapter, weight=0.8)
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder",)}
    if isinstance(pipe, StableDiffusionXLPipeline):
        reference = StableDiffusionXLAdapterPipeline(**parts, adapter=adapter.adapter)
    else:
        reference = StableDiffusionAdapterPipeline(**parts, adapter=adapter.adapter, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    with attach(pipe, "a b", item):
        ours = draw(pipe, guidance_scale=guidance)
    options = {"image": item.condition, "adapter_conditioning_scale": 0.8, "guidance_scale": guidance}
    theirs = draw(reference, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - draw(pipe, guidance_scale=guidance)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", PIPES)
def test_zero_mask_is_no_adapter(
    kind: str, make_adapter: MakeAdapter, xl_adapter: LocalAdapter, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(kind)
    with attach(pipe, "a b", control(adapter_for(pipe, make_adapter, xl_adapter), mask=0.0)):
        steered = draw(pipe)
    assert torch.equal(steered, draw(pipe))


def check_pairing(pipe: StableDiffusionPipeline, item: LocalAdapterControl) -> None:
    """2 prompts x 3 images in one call equal six single calls, each with its prompt's own condition."""
    prompts = ["a cat", "dogs"]
    with attach(pipe, prompts, item):
        together = draw(pipe, prompts, count=6, num_images_per_prompt=3)
    for row in range(6):
        which = row // 3
        single = LocalAdapterControl(item.adapter, item.condition[which], item.mask[0])
        with attach(pipe, prompts[which], single):
            alone = draw(pipe, prompts[which], latents=noise(6)[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)


def test_several_images_per_prompt_follow_their_prompts_condition(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = control(make_adapter(), layouts=2)
    check_pairing(sd_pipe, item)
    shift_rows(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        check_pairing(sd_pipe, item)


def test_every_call_gets_its_own_copies(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    with attach(sd_pipe, "a b", control(make_adapter())), watched(sd_pipe) as seen:
        draw(sd_pipe)
    assert len(seen) == 3
    tensors = [tensor for call in seen for tensor in call or ()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 12
    assert all(tensor.shape[0] == 2 for tensor in tensors)  # both halves of classifier-free guidance


def test_weights_add_up_over_controls_and_nested_attaches(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    first, second = control(make_adapter(1), weight=0.7), control(make_adapter(2), weight=-0.3)
    results = []
    with attach(sd_pipe, "a b", [first, second]), watched(sd_pipe) as seen:
        results.append(draw(sd_pipe))
    with attach(sd_pipe, "a b", first), attach(sd_pipe, "a b", second):
        results.append(draw(sd_pipe))
    assert torch.equal(*results)
    features = [item.adapter(torch.cat([item.condition, item.mask], dim=1)) for item in (first, second)]
    for given, one, two in zip(seen[0] or (), *features, strict=True):
        torch.testing.assert_close(given[:1], 0.7 * one - 0.3 * two)


def test_residuals_of_the_user_are_kept(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    item = control(make_adapter())

    def own(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "down_intrablock_additional_residuals": [torch.ones(2, 8, 8, 8)]}

    hook = sd_pipe.unet.register_forward_pre_hook(own, with_kwargs=True)
    with attach(sd_pipe, "a b", item), watched(sd_pipe) as seen:
        draw(sd_pipe)
    hook.remove()
    features = item.adapter(torch.cat([item.condition, item.mask], dim=1))
    given = seen[0]
    assert given is not None and len(given) == 4
    torch.testing.assert_close(given[0][:1], features[0] + 1)
    torch.testing.assert_close(given[1][:1], features[1])


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_windows_count_outer_steps_with_every_scheduler(
    scheduler: str, make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    set_scheduler(sd_pipe, scheduler)
    steps: list[tuple[int, int]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        steps.append(outer_step(sd_pipe.scheduler, float(args[1])))

    sd_pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    early, late = control(make_adapter(), end=0.5), control(make_adapter(), start=0.5)
    active = []
    for item in (early, late):
        steps.clear()
        with attach(sd_pipe, "a b", item), watched(sd_pipe) as seen:
            draw(sd_pipe, num_inference_steps=4)
        active.append([residuals is not None for residuals in seen])
    # Second-order Heun and KDPM2 call twice per step but for the last; PNDM warms up with the second timestep.
    second_order = [0, 0, 1, 1, 2, 2, 3]
    calls = {"pndm": [0, 1, 1, 2, 3]} | dict.fromkeys(("heun", "kdpm2", "kdpm2_ancestral"), second_order)
    expected = calls.get(scheduler, [0, 1, 2, 3])
    assert steps == [(step, 4) for step in expected]
    assert active == [[step < 2 for step in expected], [step >= 2 for step in expected]]


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_schedulers_with_steps_in_between(name: str, sd_pipe: StableDiffusionPipeline) -> None:
    import diffusers

    sd_pipe.scheduler = getattr(diffusers, name).from_config(sd_pipe.scheduler.config)
    steps: list[int] = []
    sd_pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(outer_step(sd_pipe.scheduler, float(args[1]))[0]), with_kwargs=True
    )
    draw(sd_pipe, num_inference_steps=4)
    assert steps == [0, 0, 1, 1, 2, 2, 3]


def test_a_timestep_off_the_schedule_is_an_error(sd_pipe: StableDiffusionPipeline) -> None:
    sd_pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 3.5, which is not on"):
        outer_step(sd_pipe.scheduler, 3.5)


def footprint(pipe: DiffusionPipeline) -> tuple[Any, ...]:
    return (
        dict(vars(pipe)),
        pipe.encode_prompt,
        pipe.maybe_free_model_hooks,
        [dict(vars(module)) for module in pipe.unet.modules()],
        dict(pipe.unet._forward_pre_hooks),
        dict(pipe.unet._forward_pre_hooks_with_kwargs),
    )


def test_detaching_leaves_no_trace_also_after_an_exception(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    plain = draw(sd_pipe)
    before = footprint(sd_pipe)
    with attach(sd_pipe, "a b", control(make_adapter())):
        assert footprint(sd_pipe) != before
        draw(sd_pipe)
    assert footprint(sd_pipe) == before

    def fail(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"), attach(sd_pipe, "a b", control(make_adapter())):
        draw(sd_pipe, callback_on_step_end=fail)
    assert footprint(sd_pipe) == before
    assert torch.equal(draw(sd_pipe), plain)


def test_a_wrapper_of_somebody_else_comes_back(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    calls: list[Any] = []
    original = sd_pipe.encode_prompt

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    theirs.__wrapped__ = original  # type: ignore[attr-defined]
    sd_pipe.encode_prompt = theirs
    with attach(sd_pipe, "a b", control(make_adapter())):
        draw(sd_pipe)
    assert sd_pipe.encode_prompt is theirs and len(calls) == 1


def test_another_pipeline_on_the_same_unet_is_not_steered(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    other = StableDiffusionPipeline(**sd_pipe.components, requires_safety_checker=False)
    second = StableDiffusionImg2ImgPipeline(**sd_pipe.components, requires_safety_checker=False)
    for pipe in (other, second):
        pipe.set_progress_bar_config(disable=True)
    photo: dict[str, Any] = {"image": torch.zeros(1, 3, 64, 64), "strength": 0.7}
    options = {"num_inference_steps": 3, "output_type": "latent"}

    def redraw() -> Tensor:
        return second("dogs", **photo, **options, generator=torch.Generator().manual_seed(0)).images

    plain, plain_redrawn = draw(other, "dogs"), redraw()
    text = torch.zeros(1, 7, 16)
    alone = sd_pipe.unet(noise(1), 5, text).sample
    with attach(sd_pipe, "a b", control(make_adapter())):
        steered = draw(sd_pipe)
        assert torch.equal(draw(other, "dogs"), plain)
        assert torch.equal(redraw(), plain_redrawn)
        assert torch.equal(sd_pipe.unet(noise(1), 5, text).sample, alone)
        assert torch.equal(draw(sd_pipe), steered)
    assert not torch.equal(draw(sd_pipe), steered)


def test_a_call_that_failed_does_not_spoil_the_next(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    with attach(sd_pipe, "a b", control(make_adapter())):
        first = draw(sd_pipe)
        with pytest.raises(ValueError, match="prompt 'x' but"):
            draw(sd_pipe, "x")
        assert torch.equal(draw(sd_pipe), first)


@pytest.mark.parametrize("kind", ["sd_pipe", "sdxl_pipe"])
def test_a_prompt_that_is_not_the_layouts_is_an_error(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)
    with attach(pipe, [Layout("a"), Layout("b")], []):
        draw(pipe, ["a", "b"], count=2)
        for wrong in (["b", "a"], ["a", "c"]):
            with pytest.raises(ValueError, match="but the attached layout has"):
                draw(pipe, wrong, count=2)
        with pytest.raises(ValueError, match="1 prompts for 2 layouts"):
            draw(pipe, "a")
    with attach(pipe, "a", []):
        draw(pipe, ["a", "a"], count=2)  # one layout, as often as wanted
        with pytest.raises(ValueError, match="prompt 'b' but"):
            draw(pipe, ["a", "b"], count=2)


def test_embeddings_are_taken_at_their_word(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    positive, negative = sd_pipe.encode_prompt("a b", "cpu", 1, True)
    with attach(sd_pipe, "a b", control(make_adapter())):
        by_text = draw(sd_pipe)
        by_embeds = draw(sd_pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
    torch.testing.assert_close(by_embeds, by_text)


def test_other_misfits_are_named(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    with (
        attach(sd_pipe, Layout("a b", 64, 128), control(make_adapter())),
        pytest.raises(ValueError, match="generates 64x64 pixels but the layout is 128x64"),
    ):
        draw(sd_pipe)
    with pytest.raises(ValueError, match="no layout"), attach(sd_pipe, [], []):
        pass
    with pytest.raises(ValueError, match="has no unet"), attach(torch.nn.Module(), "a", []):  # type: ignore[arg-type]
        pass

    def doubled(module: Any, args: Any, kwargs: Any) -> Any:
        return (torch.cat([args[0]] * 2), *args[1:]), kwargs

    sd_pipe.unet.register_forward_pre_hook(doubled, with_kwargs=True)
    with attach(sd_pipe, "a b", control(make_adapter())), pytest.raises(ValueError, match="4 rows for 1 images"):
        draw(sd_pipe)


def test_guidance_may_be_switched_off_midway(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    options: dict[str, Any] = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with attach(sd_pipe, "a b", control(make_adapter())), watched(sd_pipe) as seen:
        draw(sd_pipe, **options)
    assert [residuals[0].shape[0] for residuals in seen if residuals] == [2, 1, 1]
