"""Every region method together with all else that steers a pipeline: it changes the image and shifts attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT, noise, processors
from composition_helpers import KINDS, is_xl, redraw
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import Control
from localctl.control.image_controls import LocalAdapterControl
from localctl.control.layout_guidance import LayoutGuidance

# At their tiny sizes, 2.1 differs from 1.5 by what the U-Net predicts alone.
PIPES = ("sd_pipe", pytest.param("v_pipe", marks=pytest.mark.slow), "sdxl_pipe")
MOST = [kind for kind in KINDS if kind != "controlnet"]  # two are more
XL_KINDS = ("two controlnets", "ip-adapter", "lora", "img2img")
OTHERS = [
    pytest.param(base, kind, marks=pytest.mark.slow)
    for base, kind in product(("sd_pipe", "v_pipe", "sdxl_pipe"), KINDS)
    if not (base == "sd_pipe" and kind in MOST) and not (base == "sdxl_pipe" and kind in XL_KINDS)
]
SITES = ("up/2",)  # where guidance looks; on these small grids the published ones have one cell and four
STRONG: dict[str, Callable[[], Control]] = {
    **METHODS,
    "guidance": lambda: LayoutGuidance(scale=100.0, threshold=0.0, iterations=3, end=0.5, sites=SITES),
}


def check_methods(pipe: Any, options: dict[str, Any], others: tuple[Control, ...] = ()) -> dict[str, Tensor]:
    """Each method changes the image and raises the share of each phrase's attention in its region; but for space-time
    attention, which mixes in texts of its own and leaves that of the prompt as it is."""
    # At the end of the noise, where the methods are strongest.
    pipe.scheduler.register_to_config(timestep_spacing="trailing")
    before = processors(pipe)
    looks = {method: AttentionMaps(end=0.5, sites=SITES if method == "guidance" else None) for method in STRONG}
    with attach(pipe, LAYOUT, [*others, *looks.values()]):
        plain = redraw(pipe, PROMPT, noise(1), **options)
    generated = {}
    for method, make in STRONG.items():
        after_it = AttentionMaps(end=0.5, sites=looks[method].sites)
        with attach(pipe, LAYOUT, [*others, make(), after_it]):
            generated[method] = redraw(pipe, PROMPT, noise(1), **options)
        assert (generated[method] - plain).abs().max() > 1e-4, method
        if method == "spacetime":
            continue
        shares = [[item.mass(0, region) for region in range(2)] for item in (looks[method], after_it)]
        if method == "guidance":  # its energy is of both phrases together
            assert sum(shares[1]) > sum(shares[0]) + 1e-5, method
        else:
            assert all(now > then + 1e-4 for then, now in zip(*shares, strict=True)), method
    after = processors(pipe)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    return generated


@pytest.mark.parametrize(("base", "kind"), [*product(PIPES[:1], MOST), *product(PIPES[2:], XL_KINDS), *OTHERS])
def test_every_method_in_everything(base: str, kind: str, request: pytest.FixtureRequest) -> None:
    pipe, options = KINDS[kind](request.getfixturevalue(base))
    check_methods(pipe, options)


@pytest.mark.parametrize("base", PIPES)
def test_every_method_beside_two_local_adapters(
    base: str, make_adapter: Callable[..., LocalAdapter], xl_adapter: LocalAdapter, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(base)
    adapters = [xl_adapter, copy.deepcopy(xl_adapter)] if is_xl(pipe) else [make_adapter(1), make_adapter(2)]
    torch.manual_seed(3)
    controls = tuple(LocalAdapterControl(item, torch.rand(1, 64, 64), torch.ones(1, 64, 64)) for item in adapters)
    both, one = check_methods(pipe, {}, controls), check_methods(pipe, {}, controls[:1])
    assert all((both[method] - one[method]).abs().max() > 1e-4 for method in both)


@pytest.mark.parametrize("base", ["sd_pipe", "sdxl_pipe"])
def test_guidance_sees_the_masks_of_an_ip_adapter(base: str, request: pytest.FixtureRequest) -> None:
    """Swapping or omitting the control images changes the result; repeating the same call does not."""
    pipe, options = KINDS["ip-adapter"](request.getfixturevalue(base))
    masks = options["cross_attention_kwargs"]["ip_adapter_masks"]
    swapped = {**options, "cross_attention_kwargs": {"ip_adapter_masks": [mask.flip(1) for mask in masks]}}
    with attach(pipe, LAYOUT, STRONG["guidance"]()):
        generated = redraw(pipe, PROMPT, noise(1), **options)
        assert (redraw(pipe, PROMPT, noise(1), **swapped) - generated).abs().max() > 1e-4
        assert torch.equal(redraw(pipe, PROMPT, noise(1), **options), generated)


def test_offloading_changes_nothing(request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue("sd_pipe")
    controls = [make() for make in STRONG.values()]
    with attach(pipe, LAYOUT, controls):
        expected = redraw(pipe, PROMPT, noise(1))
    KINDS["offload"](pipe)
    with attach(pipe, LAYOUT, controls):
        assert torch.equal(redraw(pipe, PROMPT, noise(1)), expected)
