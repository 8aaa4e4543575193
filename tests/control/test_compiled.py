"""A compiled U-Net under controls: the same images, and no graph for every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from attachment_helpers import LAYOUT, METHODS, adapter_control, draw
from diffusers import StableDiffusionPipeline
from torch._dynamo.utils import counters

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.base import Control
from localctl.control.layout_guidance import LayoutGuidance

STEPS = {"num_inference_steps": 2}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def whole(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)


def in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager", fullgraph=True)


def forward(pipe: Any) -> None:
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager", fullgraph=True)


def blocks(pipe: Any) -> None:
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)


WAYS: dict[str, Callable[[Any], None]] = {way.__name__: way for way in (whole, in_place, forward, blocks)}


@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way == "blocks" else pytest.mark.slow) for way in WAYS])
def test_the_same_images_without_a_graph_for_each_step(
    way: str, sd_pipe: StableDiffusionPipeline, make_adapter: Callable[..., LocalAdapter]
) -> None:
    controls: dict[str, Control] = {name: make() for name, make in METHODS.items()}
    controls["guidance"] = LayoutGuidance(end=0.5, threshold=0.0, iterations=1)
    controls["adapter"] = adapter_control(make_adapter())
    expected = {}
    for name, control in controls.items():
        with attach(sd_pipe, LAYOUT, control):
            expected[name] = draw(sd_pipe, **STEPS)
    plain = draw(sd_pipe, **STEPS)
    WAYS[way](sd_pipe)
    torch.testing.assert_close(draw(sd_pipe, **STEPS), plain)
    with attach(sd_pipe, LAYOUT, controls["adapter"]):  # one more graph, which adds the residuals
        draw(sd_pipe, **STEPS)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, control in controls.items():
            with attach(sd_pipe, LAYOUT, control):
                torch.testing.assert_close(draw(sd_pipe, **STEPS), expected[name], msg=name)
        torch.testing.assert_close(draw(sd_pipe, **STEPS), plain)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("way", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_steps_outside_the_window_run_compiled(way: str, sd_pipe: StableDiffusionPipeline) -> None:
    ran: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append("graph")
            return graph.forward(*args)

        return run

    if way == "whole":
        sd_pipe.unet = torch.compile(sd_pipe.unet, backend=backend)
    else:
        sd_pipe.unet.compile_repeated_blocks(backend=backend)
    draw(sd_pipe, **STEPS)
    ran.clear()
    draw(sd_pipe, **STEPS)
    all_steps = len(ran)
    ran.clear()
    with attach(sd_pipe, LAYOUT, METHODS["bias"]().__class__(end=0.5)):
        draw(sd_pipe, **STEPS)
    assert 0 < len(ran) == all_steps / 2


def test_a_compiled_module_is_as_it_was(sd_pipe: StableDiffusionPipeline) -> None:
    sd_pipe.unet.compile(backend="eager")
    own = sd_pipe.unet._compiled_call_impl
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        draw(sd_pipe)
    assert sd_pipe.unet._compiled_call_impl is own


def test_two_attached_at_once_leave_the_compiler_as_it_was(sd_pipe: StableDiffusionPipeline) -> None:
    """The control that was attached first is detached first."""
    stance = torch._dynamo.eval_frame._stance
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()), attach(sd_pipe, LAYOUT, METHODS["dense"]()):
        draw(sd_pipe, **STEPS)
    assert torch._dynamo.eval_frame._stance == stance
