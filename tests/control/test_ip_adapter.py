"""Images as prompts: with a full mask as the stock pipeline, outside of a mask without any effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from addon_files import save_ip_adapter
from attachment_helpers import assert_same_draw
from PIL import Image
from torch import Tensor

from localctl.addons.ip_adapters import with_ip_adapters
from localctl.control.attach import attach
from localctl.control.ip_adapter import ImagePrompt, IPAdapterControl
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout, Region
from localctl.sampling import generate

PROMPT = "a cat, dogs"
RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.radial_gradient("L").convert("RGB")


def draw(pipe: Any, prompts: int = 1, **options: Any) -> Tensor:
    latents = torch.randn(prompts, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": latents, **options}
    return pipe([PROMPT] * prompts, height=64, width=64, **options).images


def left() -> Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    return mask


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_image_without_a_mask_is_the_stock_pipeline(kind: str, tmp_path: Path, request: Any) -> None:
    pipe = request.getfixturevalue(f"{kind}_pipe")
    plain = draw(pipe)
    with with_ip_adapters(pipe, [save_ip_adapter(tmp_path, pipe)]):
        pipe.set_ip_adapter_scale(0.5)
        wanted = draw(pipe, ip_adapter_image=RED)
        pipe.set_ip_adapter_scale(1.0)
        with attach(pipe, PROMPT, IPAdapterControl([ImagePrompt(RED, weight=0.5)])):
            assert torch.equal(draw(pipe), wanted)
        with attach(pipe, PROMPT, IPAdapterControl([ImagePrompt(RED, torch.zeros(1, 64, 64))])):
            assert torch.equal(draw(pipe), plain)
        with attach(pipe, PROMPT, IPAdapterControl([ImagePrompt(RED, start=0.5)])):
            late = draw(pipe)
    assert not torch.equal(wanted, plain) and not torch.equal(late, plain) and not torch.equal(late, wanted)
    assert torch.equal(draw(pipe), plain)  # taken off without a trace


def test_outside_of_its_mask_an_image_adds_nothing_in_any_layer(sd_pipe: Any, tmp_path: Path) -> None:
    seen: list[tuple[Tensor, tuple[int, ...]]] = []

    def look(module: Any, inputs: Any, output: Tensor) -> None:
        seen.append((output, tuple(inputs[0].shape)))

    def outputs(control: list[IPAdapterControl], **options: Any) -> list[tuple[Tensor, tuple[int, ...]]]:
        seen.clear()
        with attach(sd_pipe, PROMPT, control):
            draw(sd_pipe, num_inference_steps=1, **options)
        return list(seen)

    # The first cross-attention: its input is still the same with and without the image.
    first = sd_pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_out[0]
    hook = first.register_forward_hook(look)
    base = outputs([])[0][0].reshape(2, 8, 8, -1)
    hook.remove()
    with with_ip_adapters(sd_pipe, [save_ip_adapter(tmp_path, sd_pipe)]):
        hook = first.register_forward_hook(look)
        found = outputs([IPAdapterControl([ImagePrompt(RED, left())])])[0][0].reshape(2, 8, 8, -1)
        hook.remove()
    assert torch.equal(found[:, :, 4:], base[:, :, 4:])
    assert (found[:, :, :4] - base[:, :, :4]).abs().amax(dim=-1).min() > 0


def test_images_of_several_adapters_and_layouts_do_not_depend_on_the_batch(sd_pipe: Any, tmp_path: Path) -> None:
    files = [save_ip_adapter(tmp_path, sd_pipe, seed, f"ip{seed}") for seed in (1, 2)]
    masks = torch.cat([left(), 1 - left()])[:, None]
    prompts = [
        ImagePrompt([RED, BLUE], masks),
        ImagePrompt(BLUE, weight=0.3),
        ImagePrompt(RED, left(), adapter=1, end=0.5),
    ]
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    layouts = [Layout(PROMPT, 64, 64), Layout("dogs", 64, 64)]
    with with_ip_adapters(sd_pipe, files):
        found = [
            torch.stack(
                generate(sd_pipe, layouts, IPAdapterControl(prompts), [1, 2], batch_size=size, **arguments).images
            )
            for size in (1, 4)
        ]
        one = generate(
            sd_pipe, layouts[1], IPAdapterControl([ImagePrompt(BLUE, masks[1]), *prompts[1:]]), 2, **arguments
        )
    assert_same_draw(*found)
    assert_same_draw(one.images[0], found[0][3])
    assert (found[0][0] - found[0][2]).abs().max() > 1e-3


def test_masks_act_together_with_every_method(sd_pipe: Any, tmp_path: Path) -> None:
    layout = Layout(PROMPT, 64, 64, (Region("a cat", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0, 1, 1))))
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    bias, mix, guided = RegionBias(strength=0.5), SpaceTimeAttention(), LayoutGuidance(end=1.0, threshold=0.0)
    alone = {method: generate(sd_pipe, layout, method, 1, **arguments).images[0] for method in (bias, mix)}
    with with_ip_adapters(sd_pipe, [save_ip_adapter(tmp_path, sd_pipe)]):
        image, empty = (IPAdapterControl([ImagePrompt(RED, mask)]) for mask in (left(), 0 * left()))
        only = generate(sd_pipe, layout, image, 1, **arguments).images[0]
        for method in (bias, mix):
            both = generate(sd_pipe, layout, [method, image], 1, **arguments).images[0]
            assert (both - alone[method]).abs().max() > 1e-3 and (both - only).abs().max() > 1e-4
            assert_same_draw(alone[method], generate(sd_pipe, layout, [method, empty], 1, **arguments).images[0])
        # Guidance runs the denoiser again on some of the rows.
        both, single = (
            generate(sd_pipe, layout, [guided, image], [1, 2], batch_size=size, **arguments).images[0]
            for size in (2, 1)
        )
        assert_same_draw(both, single)
        assert (both - only).abs().max() > 1e-4


def test_images_that_cannot_act_are_refused(sd_pipe: Any, tmp_path: Path) -> None:
    control = IPAdapterControl([ImagePrompt(RED)])
    with pytest.raises(ValueError, match="the pipeline has 0"), attach(sd_pipe, PROMPT, control):
        pass
    for prompt, message in (
        ({"image": RED, "start": 1.0}, "start < end"),
        ({"image": []}, "has no image"),
        ({"image": RED, "weight": float("nan")}, "finite"),
        ({"image": RED, "adapter": -1}, "whole number from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ImagePrompt(**prompt)
    with pytest.raises(ValueError, match="at least one"):
        IPAdapterControl([])
    with with_ip_adapters(sd_pipe, [save_ip_adapter(tmp_path, sd_pipe)]):
        for wrong, message in (
            (IPAdapterControl([ImagePrompt(RED, adapter=1)]), "the IP-Adapter 1 but the pipeline has 1"),
            (IPAdapterControl([ImagePrompt([RED, BLUE, RED])]), "3 images of a prompt for 1 layouts"),
        ):
            with pytest.raises(ValueError, match=message), attach(sd_pipe, PROMPT, wrong):
                pass
        small = IPAdapterControl([ImagePrompt(RED, torch.ones(1, 32, 32))])
        with pytest.raises(ValueError, match="mask of an image prompt is 32x32"), attach(sd_pipe, PROMPT, small):
            draw(sd_pipe)
        with pytest.raises(ValueError, match="given twice"), attach(sd_pipe, PROMPT, control):
            draw(sd_pipe, ip_adapter_image=RED)
        with pytest.raises(ValueError, match="given twice"), attach(sd_pipe, PROMPT, [control, control]):
            draw(sd_pipe)
        with attach(sd_pipe, PROMPT, control):
            assert draw(sd_pipe).isfinite().all()
