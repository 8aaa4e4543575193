"""What moves between host and device in each call of the denoiser; the meta device stands for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT, adapter_control, draw
from diffusers import ControlNetModel, StableDiffusionPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localctl.adapter import LocalAdapter
from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.control.forward_guidance import ForwardGuidance
from localctl.control.image_controls import MaskedControlNet
from localctl.control.latents import Schedule
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout, Region

NEGATIVE = Layout(
    PROMPT,
    regions=(
        Region("cat", (0, 0, 0.5, 1), negative_prompt="x"),
        Region("dogs", (0.25, 0.25, 1, 1), negative_prompt="y", strength=0.5),
    ),
)
ADAPTER, CONTROLNET = "adapter", "controlnet"
GROUPS: dict[str, tuple[Control | str, ...]] = {
    "default": (*(make() for make in METHODS.values()), NegativePrompts(), ForwardGuidance(end=1.0), ADAPTER),
    "other texts": (
        RegionBias(std="global", hide_phrases=True),
        DenseModulation(end=1.0, hide_phrases=True),
        SpaceTimeAttention(schedule="linear", hide_phrases=True),
        AttentionMaps(),
    ),
    "by matrices": (
        DenseModulation(end=1.0, rest="free", w_self=0.5),  # regions of two strengths overlap
        SpaceTimeAttention(mix="released"),
        SpaceTimeAttention(weights=torch.full((4, 2), 0.4)),
        CONTROLNET,
    ),
}


class Traffic(TorchDispatchMode):
    """Names the operations that take values from the host to the device, or read them back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        kinds = {tensor.device.type for tensor in given}
        if kinds and {tensor.device.type for tensor in made} | kinds == {"cpu", "meta"}:
            self.seen.append(str(func))
        return result


@contextmanager
def calls(pipe: Any, controls: Sequence[Control]) -> Iterator[Callable[[int], list[str]]]:
    """Attach; calls the U-Net at a step and returns its traffic."""
    with attach(pipe, NEGATIVE, controls) as attached, torch.no_grad():
        attached._installation.check = None  # it reads one output
        pipe.encode_prompt(PROMPT, "cpu", 1, True)
        pipe.scheduler.set_timesteps(4)
        pipe.progress_bar(total=4)
        sample, text = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, 77, 16, device="meta")

        def call(step: int) -> list[str]:
            with Traffic() as traffic:
                pipe.unet(sample, pipe.scheduler.timesteps[step], encoder_hidden_states=text, return_dict=False)
            return traffic.seen

        yield call


@pytest.mark.parametrize("name", GROUPS)
def test_a_call_moves_nothing_but_what_the_plain_call_moves(
    name: str, sd_pipe: StableDiffusionPipeline, make_adapter: Callable[..., LocalAdapter]
) -> None:
    """From the second call on; and nothing is read back, which would fail on the meta device."""
    sd_pipe.unet.to("meta")
    net = ControlNetModel.from_unet(sd_pipe.unet, load_weights_from_unet=False, conditioning_channels=1).to("meta")
    made: dict[str, Control] = {
        ADAPTER: adapter_control(make_adapter()),
        CONTROLNET: MaskedControlNet(net, torch.rand(1, 64, 64), torch.ones(1, 64, 64)),
    }
    made[ADAPTER].adapter.to("meta")  # type: ignore[attr-defined]
    controls = [made[item] if isinstance(item, str) else item for item in GROUPS[name]]
    timestep = ["aten._to_copy.default"]
    expected = timestep * (1 + (CONTROLNET in GROUPS[name]))  # the U-Net's, and the ControlNet's
    with calls(sd_pipe, controls) as call:
        assert len(call(0)) > len(expected)  # masks, maps and texts
        assert call(1) == expected


def test_the_schedule_is_read_once(sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    tolist = Tensor.tolist

    def watched(tensor: Tensor) -> Any:
        read.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", watched)
    schedule, scheduler = Schedule(), sd_pipe.scheduler
    for steps in (4, 5):
        scheduler.set_timesteps(steps)
        read.clear()
        found = [schedule.time(scheduler, time) for time in scheduler.timesteps]
        assert len(read) == 1 and found == scheduler.timesteps.double().numpy().tolist()
    assert schedule.time(scheduler, scheduler.timesteps[2:][1]) == float(scheduler.timesteps[3])  # of a part
    assert schedule.time(scheduler, scheduler.timesteps[3].clone()) == float(scheduler.timesteps[3])
    assert schedule.time(scheduler, 7) == 7.0
    with attach(sd_pipe, LAYOUT, RegionBias()):
        read.clear()
        draw(sd_pipe, num_inference_steps=5)
    assert len([tensor for tensor in read if tensor.shape == (5,)]) == 1
