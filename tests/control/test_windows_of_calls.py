"""Windows are fractions of the steps that a call makes, whatever cuts the schedule short."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT, Watch, quiet
from composition_helpers import SQUARE, is_xl, sibling, with_controlnets
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, T2IAdapter

from localctl.control.attach import attach
from localctl.control.base import CallContext
from localctl.control.layout_guidance import LayoutGuidance
from localctl.pipelines import set_scheduler

Seen = list[tuple[int, int, float]]
PHOTO = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def places(pipe: Any, **options: Any) -> tuple[list[int], int]:
    """Return the outer steps of a call, and the number of steps that a control is given."""
    seen: Seen = []
    with attach(pipe, LAYOUT, Watch(seen)):
        pipe(PROMPT, output_type="latent", **options)
    (count,) = {count for _, count, _ in seen}
    return [step for step, _, _ in seen], count


def xl_with(pipe: Any, kind: str) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of SDXL's parts that takes ``denoising_end``, and the arguments of its calls."""
    if kind == "text":
        return pipe, {}
    if kind == "controlnet":
        return with_controlnets(pipe, 1)
    if kind == "controlnet inpaint":
        built, options = with_controlnets(pipe, 1)
        image = {"image": PHOTO, "mask_image": torch.ones(1, 1, 64, 64), "control_image": PHOTO, "strength": 1.0}
        inpaint = diffusers.StableDiffusionXLControlNetInpaintPipeline(
            **{name: part for name, part in built.components.items()}
        )
        return quiet(inpaint), {**options, **image}
    if kind == "adapter":
        torch.manual_seed(0)
        channels = [*pipe.unet.config.block_out_channels, pipe.unet.config.block_out_channels[-1]]
        adapter = T2IAdapter(3, channels, 1, 16, "full_adapter_xl").eval()
        return sibling(pipe, "Adapter", adapter=adapter), {"image": PHOTO, **SQUARE}
    if kind == "img2img":
        return sibling(pipe, "Img2Img"), {"image": PHOTO, "strength": 1.0}
    assert kind == "inpaint"
    return sibling(pipe, "Inpaint"), {"image": PHOTO, "mask_image": torch.ones(1, 1, 64, 64), "strength": 1.0, **SQUARE}


@pytest.mark.parametrize("kind", ["text", "controlnet", "controlnet inpaint", "adapter", "img2img", "inpaint"])
def test_denoising_end(kind: str, sdxl_pipe: StableDiffusionXLPipeline) -> None:
    pipe, options = xl_with(sdxl_pipe, kind)
    assert places(pipe, num_inference_steps=8, denoising_end=0.5, **options) == ([0, 1, 2, 3], 4)
    assert places(pipe, num_inference_steps=8, **options) == (list(range(8)), 8)  # the next call makes all


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc", "pndm", "ddpm"])
def test_denoising_end_and_start_with_other_schedulers(name: str, sdxl_pipe: StableDiffusionXLPipeline) -> None:
    set_scheduler(sdxl_pipe, name)
    steps, count = places(sdxl_pipe, num_inference_steps=8, denoising_end=0.5)
    assert sorted(set(steps)) == list(range(count)) and count in (4, 5)
    refiner = sibling(sdxl_pipe, "Img2Img")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rest = places(refiner, image=latents, num_inference_steps=8, denoising_start=0.5)
    assert sorted(set(rest[0])) == list(range(rest[1])) and rest[1] in (3, 4, 5)  # leading spacing: the last is at 1
    middle = places(refiner, image=latents, num_inference_steps=8, denoising_start=0.25, denoising_end=0.75)
    assert sorted(set(middle[0])) == list(range(middle[1])) and middle[1] in (3, 4, 5)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "pndm"])
@pytest.mark.parametrize("fixture", ["sd_pipe", "sdxl_pipe"])
def test_strength(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(fixture)
    set_scheduler(base, name)
    pipe = sibling(base, "Img2Img")
    for strength in (0.3, 0.75):
        steps, count = places(pipe, image=PHOTO, strength=strength, num_inference_steps=8)
        # PNDM warms up with one timestep twice; Heun comes in at the second half of a step.
        assert sorted(set(steps)) == list(range(count)) and abs(count - 8 * strength) < 1.6, (steps, count)
    if is_xl(base) and name != "pndm":  # which of the two visits it begins at can't be told there
        cut = places(pipe, image=PHOTO, strength=0.75, num_inference_steps=8, denoising_end=0.5)
        assert sorted(set(cut[0])) == list(range(cut[1])) and cut[1] < 6


def test_schedules_of_ones_own(sd_pipe: StableDiffusionPipeline, sdxl_pipe: StableDiffusionXLPipeline) -> None:
    set_scheduler(sdxl_pipe, "euler")
    assert places(sdxl_pipe, timesteps=[900, 700, 400, 100]) == ([0, 1, 2, 3], 4)
    assert places(sdxl_pipe, timesteps=[900, 700, 400, 100], denoising_end=0.5) == ([0, 1], 2)
    assert places(sdxl_pipe, sigmas=[10.0, 5.0, 1.0, 0.0]) == ([0, 1, 2], 3)  # the last is where it ends
    set_scheduler(sd_pipe, "ddpm")
    assert places(sd_pipe, timesteps=[999, 500, 250]) == ([0, 1, 2], 3)


def test_guidance_keeps_to_its_share_of_a_short_call(sdxl_pipe: StableDiffusionXLPipeline) -> None:
    moved: list[int] = []
    guidance = LayoutGuidance(threshold=0.0, iterations=1, sites=("mid",))

    def shifts(self: Any, context: CallContext, *rest: Any) -> None:
        if context.within(self.control.start, self.control.end):
            moved.append(context.step)

    with attach(sdxl_pipe, LAYOUT, guidance) as attached:
        bound = attached.bound[0]
        bound.shift_latents = shifts.__get__(bound)  # type: ignore[method-assign]
        for options in ({}, {"denoising_end": 0.5}):
            sdxl_pipe(PROMPT, num_inference_steps=20, output_type="latent", **options)
    assert moved == [0, 1, 2, 3, 0, 1]


def test_a_call_leaves_nothing_behind(sdxl_pipe: StableDiffusionXLPipeline) -> None:
    before = set(vars(sdxl_pipe))
    with attach(sdxl_pipe, LAYOUT, METHODS["bias"]()):
        assert "progress_bar" in vars(sdxl_pipe)
    assert set(vars(sdxl_pipe)) == before
