"""A masked ControlNet: with a full mask it equals diffusers' own pipeline, with an empty mask the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from addon_files import random_controlnet as controlnet
from attachment_helpers import assert_same_draw
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.image_controls import LocalAdapterControl, MaskedControlNet
from localctl.sampling import generate

PROMPT = "a cat, dogs"


def condition(count: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 64, 64, generator=torch.Generator().manual_seed(7))


def draw(pipe: Any, **options: Any) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": latents, **options}
    return pipe([PROMPT] * 2, height=64, width=64, **options).images


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_full_mask_is_the_stock_pipeline_and_an_empty_one_the_base(kind: str, request: Any) -> None:
    pipe = request.getfixturevalue(f"{kind}_pipe")
    net, image = controlnet(pipe), condition()
    stock = StableDiffusionXLControlNetPipeline if kind == "sdxl" else StableDiffusionControlNetPipeline
    parts = {**pipe.components, "controlnet": net}
    parts |= {} if kind == "sdxl" else {"requires_safety_checker": False}
    theirs = stock(**parts)
    theirs.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    wanted = draw(theirs, image=image, controlnet_conditioning_scale=0.7)
    for mask, expected in ((torch.ones(1, 64, 64), wanted), (torch.zeros(1, 64, 64), plain)):
        with attach(pipe, PROMPT, MaskedControlNet(net, image, mask, weight=0.7)):
            found = draw(pipe)
        if expected is plain:
            assert torch.equal(found, plain)
        else:
            assert_same_draw(found, wanted)
    assert (wanted - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_guess_mode_is_that_of_the_stock_pipeline(kind: str, guidance_scale: float, request: Any) -> None:
    pipe = request.getfixturevalue(f"{kind}_pipe")
    net, image, mask = controlnet(pipe), condition(), torch.ones(1, 64, 64)
    stock = StableDiffusionXLControlNetPipeline if kind == "sdxl" else StableDiffusionControlNetPipeline
    theirs = stock(
        **{**pipe.components, "controlnet": net}, **({} if kind == "sdxl" else {"requires_safety_checker": False})
    )
    theirs.set_progress_bar_config(disable=True)
    options = {"guidance_scale": guidance_scale}
    wanted = draw(theirs, image=image, controlnet_conditioning_scale=0.7, guess_mode=True, **options)
    generated = {}
    for guess_mode in (True, False):
        with attach(pipe, PROMPT, MaskedControlNet(net, image, mask, weight=0.7, guess_mode=guess_mode)):
            generated[guess_mode] = draw(pipe, **options)
    assert_same_draw(generated[True], wanted)
    assert (generated[True] - generated[False]).abs().max() > 1e-3
    with attach(pipe, PROMPT, MaskedControlNet(net, image, 0 * mask, guess_mode=True)):
        empty = draw(pipe, **options)
    assert torch.equal(empty, draw(pipe, **options))


def test_residuals_are_zero_outside_the_mask_at_every_size(sd_pipe: Any) -> None:
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, :, :32] = 1
    mask[1, :, :32] = 1
    seen: list[tuple[list[Tensor], Tensor]] = []
    control = MaskedControlNet(controlnet(sd_pipe), condition(2, channels=1), mask)

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["down_block_additional_residuals"], kwargs["mid_block_additional_residual"]))

    with attach(sd_pipe, [PROMPT, "dogs"], control):
        hook = sd_pipe.unet.register_forward_pre_hook(look, with_kwargs=True)  # after attach's own
        sd_pipe([PROMPT, "dogs"], height=64, width=64, num_inference_steps=1, output_type="latent")
        hook.remove()
    down, middle = seen[0]
    sizes = {r.shape[-1] for r in down}
    assert sizes == {8, 4, 2, 1} and middle.shape[-1] == 1 and middle.abs().min() > 0
    for residual in down:
        side = residual.shape[-1]
        if side > 1:
            left, top = residual[[0, 2]], residual[[1, 3]]  # with guidance each layout has two rows
            assert not left[..., side // 2 :].any() and not top[..., side // 2 :, :].any()
            assert left[..., : side // 2].abs().min() > 0 and top[..., : side // 2, :].abs().min() > 0


def test_residuals_of_several_nets_are_summed(sd_pipe: Any) -> None:
    nets, image, mask = [controlnet(sd_pipe, seed) for seed in (0, 1)], condition(), torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    one, two = MaskedControlNet(nets[0], image, mask, weight=0.5), MaskedControlNet(nets[1], image, 1 - mask)
    seen: list[list[Tensor]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append([*kwargs["down_block_additional_residuals"], kwargs["mid_block_additional_residual"]])

    for controls in (one, two, [one, two]):
        with attach(sd_pipe, PROMPT, controls):
            hook = sd_pipe.unet.register_forward_pre_hook(look, with_kwargs=True)  # after attach's own
            draw(sd_pipe, num_inference_steps=1)
            hook.remove()
    assert all(torch.equal(a + b, both) for a, b, both in zip(*seen, strict=True))


def test_windows_weights_and_sums(sd_pipe: Any, make_adapter: Callable[..., LocalAdapter]) -> None:
    nets, image, mask = [controlnet(sd_pipe, seed) for seed in (0, 1)], condition(), torch.ones(1, 64, 64)
    one, two = (MaskedControlNet(net, image, mask) for net in nets)
    adapter = LocalAdapterControl(make_adapter(), image[:, :1], mask)
    late = MaskedControlNet(nets[0], image, mask, start=0.5)
    generated = []
    for controls in ([], [one], [two], [one, two], [one, adapter], [adapter], [late]):
        with attach(sd_pipe, PROMPT, controls):
            generated.append(draw(sd_pipe))
    for index, found in enumerate(generated):
        assert all((found - other).abs().max() > 1e-4 for other in generated[:index])
    with attach(sd_pipe, PROMPT, one), attach(sd_pipe, PROMPT, two):
        assert_same_draw(draw(sd_pipe), generated[3])


def test_images_do_not_depend_on_the_batch(sd_pipe: Any) -> None:
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, :, :32], mask[1, :, 16:] = 1, 1
    control = MaskedControlNet(controlnet(sd_pipe), condition(2), mask)
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    generated = [
        torch.stack(
            generate(sd_pipe, [PROMPT, "dogs"], control, [1, 2], paired=True, batch_size=size, **arguments).images
        )
        for size in (1, 2)
    ]
    assert_same_draw(*generated)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": torch.zeros(2, 64, 64)}, "2 channels but this ControlNet takes 3"),
        ({"condition": torch.full((3, 64, 64), 2.0)}, "condition has values outside"),
        ({"mask": torch.ones(1, 64, 72)}, "mask is 72x64 pixels but the condition is 64x64"),
        ({"mask_resize": "cubic"}, "Unknown mask_resize 'cubic'"),
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"controlnet": "folder"}, "is a str, not a diffusers ControlNetModel"),
    ],
)
def test_bad_input_is_named(sd_pipe: Any, changes: dict[str, Any], message: str) -> None:
    good = {"controlnet": controlnet(sd_pipe), "condition": condition(), "mask": torch.ones(1, 64, 64)}
    with pytest.raises(ValueError, match=message):
        MaskedControlNet(**{**good, **changes})


def test_nets_that_do_not_fit_are_refused(sd_pipe: Any, sdxl_pipe: Any) -> None:
    image, mask = condition(), torch.ones(1, 64, 64)
    with (
        pytest.raises(ValueError, match="use a ControlNet made for this base"),
        attach(sd_pipe, PROMPT, MaskedControlNet(controlnet(sdxl_pipe), image, mask)),
    ):
        pass
    with pytest.raises(ValueError, match="so they cannot be masked"):
        MaskedControlNet(controlnet(sd_pipe, global_pool_conditions=True), image, mask)
    with (
        pytest.raises(ValueError, match="3 masks for 2 layouts"),
        attach(sd_pipe, [PROMPT, "dogs"], MaskedControlNet(controlnet(sd_pipe), image, mask.expand(3, 1, 64, 64))),
    ):
        pass
