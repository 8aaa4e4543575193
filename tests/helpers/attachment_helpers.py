"""A layout, the region methods, and short draws from fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tolerances import rounding
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.attach import Attachment
from localctl.control.base import BoundControl, CallContext, Control
from localctl.control.dense import DenseModulation
from localctl.control.image_controls import LocalAdapterControl
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout, Region

PROMPT = "a cat, dogs"
LAYOUT = Layout(PROMPT, regions=(Region("cat", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0.25, 1, 1))))
OTHER = Layout("dogs x", regions=(Region("dogs", (0, 0, 1, 0.5)),))
METHODS: dict[str, Callable[[], Control]] = {
    "bias": lambda: RegionBias(strength=1.0, outside_strength=0.5),
    "dense": lambda: DenseModulation(rest="segment", end=1.0, w_self=1.0, separate_texts=False),
    "spacetime": lambda: SpaceTimeAttention(weight=0.8),
}


def noise(count: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> Tensor:
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(seed))


def draw(pipe: DiffusionPipeline, prompt: Any = PROMPT, count: int = 1, **options: Any) -> Tensor:
    """Latents (count, 4, 8, 8) after few steps from fixed noise."""
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": noise(count), **options}
    return pipe(prompt, **options).images


# In a row, a number of one call of the tiny U-Nets goes through 28 convolutions of some 220 terms and 10 transformer
# blocks of 8 sums of some 50; vector units add at least 8 terms side by side.
CALL_TERMS = (28 * 220 + 10 * 8 * 50) // 8


def assert_same_draw(found: Tensor, expected: Tensor, calls: int = 2) -> None:
    """Latents that are equal but for rounding, after so many calls of the U-Net."""
    atol = rounding(calls * CALL_TERMS, expected.dtype) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def in_double(pipe: Any) -> Any:
    """``pipe`` in float64, where rounding hides nothing; give it latents of this kind."""
    for module in (pipe.unet, pipe.text_encoder):
        module.double()
    return pipe


def adapter_control(
    adapter: LocalAdapter, layouts: int = 1, mask: float = 1.0, seed: int = 3, **options: Any
) -> LocalAdapterControl:
    """A control with differing random conditions; ``mask`` everywhere."""
    torch.manual_seed(seed)
    return LocalAdapterControl(adapter, torch.rand(layouts, 1, 64, 64), torch.full((1, 64, 64), mask), **options)


def processors(pipe: DiffusionPipeline) -> dict[str, Any]:
    return dict(pipe.unet.attn_processors)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Watch(Control):
    """Writes down (step, num_steps, sigma) of each call of the U-Net."""

    def __init__(self, seen: list[tuple[int, int, float]]) -> None:
        self.seen = seen

    def bind(self, pipe: Any, layouts: Any) -> BoundControl:
        seen = self.seen

        class Bound(BoundControl):
            def text(self, context: CallContext, text: Tensor) -> Tensor | None:
                seen.append((context.step, context.num_steps, context.sigma))
                return None

        return Bound()


def shift_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every image of a call gets the layout of the next one: what a wrong row would do."""
    begin = Attachment.begin_call

    def shifted(self: Attachment, arguments: Any) -> None:
        begin(self, arguments)
        rows = self._layout_of_image
        assert rows is not None
        self._layout_of_image = (*rows[1:], rows[0])

    monkeypatch.setattr(Attachment, "begin_call", shifted)
