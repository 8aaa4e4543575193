"""A compiled U-Net under controls: the same images, by few graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from attachment_helpers import LAYOUT, METHODS, OTHER, adapter_control, draw
from composition_helpers import with_ip_adapter
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch._dynamo.utils import counters

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import Control
from localctl.control.forward_guidance import ForwardGuidance
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.processor import SteeredProcessor
from localctl.denoisers.base import AttentionLayer

STEPS = {"num_inference_steps": 2}
CONTROLS: dict[str, Callable[[], Control]] = {
    **METHODS,
    "maps": AttentionMaps,
    "forward": lambda: ForwardGuidance(end=1.0),
    "guidance": lambda: LayoutGuidance(end=0.5, threshold=0.0, iterations=1),  # its updates run eagerly
}


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


SHAPES = {"blocks": 3}  # widths of the tiny U-Net's blocks; a compiled whole has one shape


@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way == "blocks" else pytest.mark.slow) for way in WAYS])
def test_the_same_images_by_one_more_graph_for_each_shape(
    way: str, sd_pipe: StableDiffusionPipeline, make_adapter: Callable[..., LocalAdapter]
) -> None:
    """Whatever the control, the step, the layout and the layers that it steers."""
    controls: dict[str, Control] = {name: make() for name, make in CONTROLS.items()}
    controls["adapter"] = adapter_control(make_adapter())
    expected = {}
    for name, control in controls.items():
        with attach(sd_pipe, LAYOUT, control):
            expected[name] = draw(sd_pipe, **STEPS)
    plain = draw(sd_pipe, **STEPS)
    WAYS[way](sd_pipe)
    assert torch.equal(draw(sd_pipe, **STEPS), plain)
    assert counters["stats"]["unique_graphs"] in (0, SHAPES.get(way, 1))
    for control in (controls["bias"], controls["adapter"]):  # the latter adds residuals
        with attach(sd_pipe, LAYOUT, control):
            draw(sd_pipe, **STEPS)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == {"blocks": 2 * SHAPES["blocks"], "in_place": 1}.get(way, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, control in controls.items():
            with attach(sd_pipe, LAYOUT, control):
                assert torch.equal(draw(sd_pipe, **STEPS), expected[name]), name
        with attach(sd_pipe, OTHER, controls["bias"]):
            draw(sd_pipe, OTHER.prompt, num_inference_steps=5)
        assert torch.equal(draw(sd_pipe, **STEPS), plain)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.parametrize("way", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_all_steps_run_compiled(way: str, sd_pipe: StableDiffusionPipeline) -> None:
    """Those that a control steers, and those outside its window."""
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
    assert 0 < len(ran) == all_steps


def test_what_the_operator_does_not_pass_on_runs_eagerly(sd_pipe: StableDiffusionPipeline) -> None:
    """Processors with weights and keyword arguments, here an IP-Adapter's."""
    pipe, options = with_ip_adapter(sd_pipe)
    with attach(pipe, LAYOUT, METHODS["bias"]()):
        expected = draw(pipe, **STEPS, **options)
    blocks(pipe)
    with attach(pipe, LAYOUT, METHODS["bias"]()):
        assert torch.equal(draw(pipe, **STEPS, **options), expected)
    assert not counters["stats"]["unique_graphs"]


class Scaling(AttnProcessor2_0):
    """A processor with a keyword argument of its own."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, strength: float = 1.0, **kwargs: Any) -> Any:
        return strength * super().__call__(attn, hidden_states, *args, **kwargs)


def test_a_processor_with_a_keyword_argument_of_its_own_runs_eagerly(sd_pipe: StableDiffusionPipeline) -> None:
    sd_pipe.unet.set_attn_processor(Scaling())
    scaled = {"cross_attention_kwargs": {"strength": 0.5}}
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        expected = [draw(sd_pipe, **STEPS), draw(sd_pipe, **STEPS, **scaled)]
    assert not torch.equal(*expected)
    blocks(sd_pipe)
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        assert torch.equal(draw(sd_pipe, **STEPS), expected[0])
        assert torch.equal(draw(sd_pipe, **STEPS, **scaled), expected[1])
    assert not counters["stats"]["unique_graphs"]


def test_the_signature_of_a_wrapped_default_processor_is_that_of_the_class(
    sd_pipe: StableDiffusionPipeline,
) -> None:
    """Torch 2.11 cannot compile that of an attribute of the instance."""
    attn = next(part for part in sd_pipe.unet.modules() if isinstance(part, Attention))
    wrapper = SteeredProcessor(attn.processor, attn, AttentionLayer("layer", cross=False, size=(1, 1)))
    assert "__call__" not in vars(wrapper)


def test_a_compiled_module_is_as_it_was(sd_pipe: StableDiffusionPipeline) -> None:
    sd_pipe.unet.compile(backend="eager")
    own = sd_pipe.unet._compiled_call_impl
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        draw(sd_pipe)
    assert sd_pipe.unet._compiled_call_impl is own


def test_two_attached_at_once_leave_the_compiler_as_it_was(sd_pipe: StableDiffusionPipeline) -> None:
    def settings() -> Any:
        return torch._dynamo.eval_frame._stance, torch._dynamo.config.recompile_limit

    before = settings()
    guidance = CONTROLS["guidance"]()
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()), attach(sd_pipe, LAYOUT, guidance):
        draw(sd_pipe, **STEPS)
    assert settings() == before
