"""Sampling step by step, and previews of latents."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import localctl.previews
from localctl.bases import SCHEDULERS
from localctl.control.layout_guidance import LayoutGuidance
from localctl.data.micro import MicroScenes
from localctl.diffusion import encode
from localctl.layout import Layout, Region
from localctl.pipelines import load_pipeline
from localctl.previews import LatentPreview, SamplingStep
from localctl.sampling import generate


def test_on_step_is_called_once_per_step_and_batch_and_changes_no_bit(sd_pipe: Any) -> None:
    steps: list[SamplingStep] = []
    call: dict[str, Any] = {"seeds": (0, 1, 2), "batch_size": 2, "num_inference_steps": 3}
    plain = generate(sd_pipe, "a b", **call).images
    watched = generate(sd_pipe, "a b", **call, on_step=steps.append).images
    assert all(np.array_equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert [(item.step, item.of, len(item.latents)) for item in steps if item.latents is not None] == [
        *((step, 3, 2) for step in (1, 2, 3)),
        *((step, 3, 1) for step in (1, 2, 3)),
    ]
    assert "step" not in vars(sd_pipe.scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "ddpm"])
def test_the_latents_of_a_step_are_those_that_the_scheduler_predicts(
    sd_pipe: Any, monkeypatch: pytest.MonkeyPatch, scheduler: str, prediction_type: str
) -> None:
    """diffusers' own prediction is read from the full output of the step."""
    sd_pipe.scheduler.register_to_config(prediction_type=prediction_type)
    kind = getattr(diffusers, SCHEDULERS[scheduler])
    own, expected = kind.step, []

    @functools.wraps(own)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **{**kwargs, "return_dict": True})
        expected.append(result.pred_original_sample)
        return (result.prev_sample,)

    monkeypatch.setattr(kind, "step", step)
    found: list[SamplingStep] = []
    generate(sd_pipe, "a b", num_inference_steps=3, scheduler=scheduler, on_step=found.append)
    assert len(found) == len(expected) == 3
    for item, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(item.latents, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_the_last_prediction_of_every_scheduler_is_near_its_result(sd_pipe: Any, scheduler: str) -> None:
    found: list[SamplingStep] = []
    call: dict[str, Any] = {"num_inference_steps": 8, "scheduler": scheduler, "output_type": "latent"}
    (result,) = generate(sd_pipe, "a b", **call, on_step=found.append).images
    last = found[-1].latents
    assert last is not None and found[-1].step == found[-1].of == len(found)
    assert float((last[0] - result).std() / result.std()) < 0.1


def test_an_error_of_on_step_ends_the_sampling_and_restores_the_pipeline(sd_pipe: Any) -> None:
    layout = Layout("a b", 64, 64, regions=(Region(phrase="b", box=(0, 0, 0.5, 0.5)),))
    call: dict[str, Any] = {"num_inference_steps": 4, "scheduler": "euler"}
    before = generate(sd_pipe, layout, LayoutGuidance(), **call).images[0]
    weights = {name: value.clone() for name, value in sd_pipe.unet.state_dict().items()}
    scheduler, processors = sd_pipe.scheduler, dict(sd_pipe.unet.attn_processors)
    steps = []

    def stop(step: SamplingStep) -> None:
        steps.append(step.step)
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(sd_pipe, layout, LayoutGuidance(), **call, on_step=stop)
    assert steps == [1, 2]
    assert sd_pipe.scheduler is scheduler and "step" not in vars(scheduler)
    assert sd_pipe.unet.attn_processors == processors and not sd_pipe.unet._forward_hooks
    assert all(torch.equal(value, weights[name]) for name, value in sd_pipe.unet.state_dict().items())
    assert np.array_equal(before, generate(sd_pipe, layout, LayoutGuidance(), **call).images[0])


@pytest.mark.parametrize("small", [10**9, 0])
def test_a_preview_shows_the_colours_of_the_image(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded, and by the linear map."""
    monkeypatch.setattr(localctl.previews, "_SMALL_VAE", small)
    pipe = load_pipeline("micro")
    pixels = torch.stack([MicroScenes("test", count=8)[index].pixels for index in range(8)])
    with torch.no_grad():
        shown = LatentPreview(pipe)(encode(pipe.vae, pixels))
    assert {image.size for image in shown} == {(128, 128)}
    seen = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BOX)) for image in shown]) / 127.5 - 1
    wanted = torch.nn.functional.avg_pool2d(pixels, 8).movedim(1, -1).numpy()
    unexplained = np.square(seen - wanted).mean() / np.square(wanted - wanted.mean((0, 1, 2))).mean()
    assert unexplained < (0.02 if small else 0.33)
