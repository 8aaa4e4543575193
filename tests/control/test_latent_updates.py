"""Latents shifted between steps: supported by the schedulers that claim it, refused by others, and no trace left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, PROMPT, assert_same_draw, draw, noise
from diffusers import (
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from localctl.control.attach import attach
from localctl.control.base import BoundControl, CallContext, Control, RunDenoiser
from localctl.pipelines import set_scheduler

STEPS = 3
KEPT = ("ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "dpmpp_2m")
EXPLODING = ("lms", "euler", "euler_ancestral")
SHIFT = 0.1 * noise(1, seed=5)


class Nudge(Control):
    """Add SHIFT before the chosen calls of the U-Net, and record the latents of all calls."""

    def __init__(self, *calls: int, amount: float = 1.0) -> None:
        self.calls = calls
        self.amount = amount
        self.seen: list[Tensor] = []
        self.sigmas: list[float] = []

    def bind(self, pipe: Any, layouts: Any) -> BoundControl:
        control = self

        class Bound(BoundControl):
            moves_latents = True

            def shift_latents(self, context: CallContext, latents: Tensor, run: RunDenoiser) -> Tensor | None:
                control.seen.append(latents)
                control.sigmas.append(context.sigma)
                chosen = len(control.seen) - 1 in control.calls
                return control.amount * SHIFT.expand_as(latents) if chosen else None

        return Bound()


def sampled(pipe: Any, *controls: Control, **options: Any) -> Tensor:
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(1), **options}
    if not controls:
        return draw(pipe, **options)
    with attach(pipe, LAYOUT, controls):
        return draw(pipe, **options)


@pytest.mark.parametrize("name", [*KEPT, "karras"])
def test_a_shift_before_any_step_moves_the_result(name: str, sd_pipe: StableDiffusionPipeline) -> None:
    """The shift has the same effect as a change of the latents between the steps."""
    set_scheduler(sd_pipe, "dpmpp_2m" if name == "karras" else name)
    if name == "karras":
        config = sd_pipe.scheduler.config
        sd_pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    plain = sampled(sd_pipe)
    watch = Nudge()
    assert torch.equal(sampled(sd_pipe, watch), plain)
    assert len(watch.seen) == STEPS + (name == "pndm")
    for step in range(len(watch.seen)):
        moved = sampled(sd_pipe, Nudge(step))
        assert (moved - plain).abs().max() > 1e-3, step
        if step == 0 or (name == "pndm" and step == 1):
            continue
        factor = (watch.sigmas[step] ** 2 + 1) ** 0.5 if name in EXPLODING else 1.0

        def between(pipe: Any, done: int, time: Any, tensors: Any, step: int = step, factor: float = factor) -> Any:
            return {"latents": tensors["latents"] + factor * SHIFT} if done == step - 1 else tensors

        assert_same_draw(moved, sampled(sd_pipe, callback_on_step_end=between), calls=STEPS)
    assert torch.equal(sampled(sd_pipe), plain)


def test_the_second_call_of_pndm_moves_what_it_repeats(sd_pipe: StableDiffusionPipeline) -> None:
    """PNDM averages the second call into the first step, where the shift becomes a shift of the next latents."""
    set_scheduler(sd_pipe, "pndm")
    watch, small = Nudge(), Nudge(1, amount=1e-3)
    sampled(sd_pipe, watch)
    sampled(sd_pipe, small)
    moved = (small.seen[2] - watch.seen[2]) / 1e-3
    share = (moved * SHIFT).sum() / SHIFT.square().sum()
    assert 0.8 < share < 1.2  # the rest is the U-Net's reaction to it


def test_several_images_halves_and_nested_attaches(sd_pipe: StableDiffusionPipeline) -> None:
    options = {"latents": noise(2), "num_images_per_prompt": 2}
    with attach(sd_pipe, LAYOUT, [Nudge(1), Nudge(1, 2)]):
        together = draw(sd_pipe, num_inference_steps=STEPS, **options)
    with attach(sd_pipe, LAYOUT, Nudge(1)), attach(sd_pipe, LAYOUT, Nudge(1, 2)):
        nested = draw(sd_pipe, num_inference_steps=STEPS, **options)
        assert "step" not in vars(sd_pipe.scheduler)
    assert_same_draw(nested, together, calls=STEPS)
    with attach(sd_pipe, LAYOUT, [Nudge(1, amount=2), Nudge(2)]):
        assert_same_draw(draw(sd_pipe, num_inference_steps=STEPS, **options), together, calls=STEPS)
    single = sampled(sd_pipe, Nudge(1), Nudge(1, 2), latents=noise(2)[1:], guidance_scale=7.5)
    assert_same_draw(together[1:], single, calls=STEPS)


def test_inpainting_keeps_its_other_channels(sd_pipe: StableDiffusionPipeline) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**sd_pipe.unet.config, "in_channels": 9}).eval().requires_grad_(False)
    parts = {**sd_pipe.components, "unet": unet, "requires_safety_checker": False}
    pipe = StableDiffusionInpaintPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    photo = {"image": torch.rand(1, 3, 64, 64), "mask_image": torch.ones(1, 1, 64, 64), "height": 64, "width": 64}

    def paint(*controls: Control) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        with attach(pipe, LAYOUT, controls):
            return pipe(PROMPT, **photo, num_inference_steps=3, output_type="latent", generator=generator).images

    watch = Nudge(2)
    assert (paint(watch) - paint()).abs().max() > 1e-3
    assert watch.seen[0].shape == (1, 4, 8, 8)


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, UniPCMultistepScheduler])
def test_schedulers_that_lose_a_shift_are_refused(kind: Any, sd_pipe: StableDiffusionPipeline) -> None:
    good, bad = sd_pipe.scheduler, kind.from_config(sd_pipe.scheduler.config)
    message = f"{kind.__name__} would lose a control's shift of the latents"
    with attach(sd_pipe, LAYOUT, Nudge(1)):
        sd_pipe.scheduler = bad
        with pytest.raises(ValueError, match=message):
            draw(sd_pipe)
    with pytest.raises(ValueError, match=message), attach(sd_pipe, LAYOUT, Nudge(1)):
        pass
    sd_pipe.scheduler = good
    set_scheduler(sd_pipe, "pndm")
    sd_pipe.scheduler.register_to_config(skip_prk_steps=False)
    with pytest.raises(ValueError, match="skip_prk_steps=True"), attach(sd_pipe, LAYOUT, Nudge(1)):
        pass


def test_no_trace_is_left_after_errors(sd_pipe: StableDiffusionPipeline) -> None:
    plain = sampled(sd_pipe)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = None
    with attach(sd_pipe, LAYOUT, Nudge(0)), attach(sd_pipe, LAYOUT, Nudge(0)):
        hook = sd_pipe.unet.mid_block.register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            draw(sd_pipe)
        assert "step" in vars(sd_pipe.scheduler)  # the step the shift was for never came
        hook.remove()
        draw(sd_pipe)
        assert "step" not in vars(sd_pipe.scheduler)
        hook = sd_pipe.unet.mid_block.register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            draw(sd_pipe)
    hook.remove()
    assert "step" not in vars(sd_pipe.scheduler)
    assert torch.equal(sampled(sd_pipe), plain)
