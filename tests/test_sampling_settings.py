"""The record of how to sample, and that ``generate`` does as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

import localctl
from localctl import Sampling
from localctl.evaluation.settings import FidSettings
from localctl.sampling import initial_noise
from localctl.sampling_settings import own_sampling

LATENT: dict[str, Any] = {"output_type": "latent"}


def test_what_is_said_first_counts() -> None:
    asked = Sampling(scheduler="ddpm", seeds=3).over(Sampling("ddim", 4.0, seeds=(1, 2))).over(own_sampling("micro"))
    assert asked == Sampling("ddpm", 4.0, seeds=[3]) and asked.arguments() == {"guidance_scale": 4.0}
    assert Sampling(guidance_scale=0.0).over(own_sampling("micro")).guidance_scale == 0.0
    assert own_sampling("micro").guidance_scale == 2.0 and own_sampling("owner/name") == own_sampling("") == Sampling()


def test_any_settings_record_is_read() -> None:
    settings = FidSettings(num_inference_steps=7, scheduler="euler")
    assert Sampling.of(settings) == Sampling("euler", 2.0, 7, batch_size=16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": "dim"}, "Unknown scheduler 'dim'; choose one of ddim"),
        ({"seeds": []}, "There is no seed"),
        ({"batch_size": 0}, "batch size must be at least 1, not 0"),
        ({"num_inference_steps": 0}, "num inference steps must be at least 1, not 0"),
        ({"true_cfg_scale": -1}, "true cfg scale must be at least 0, not -1"),
        ({"eta": -0.5}, "eta must be at least 0, not -0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, not nan"),
    ],
)
def test_what_makes_no_sense_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_generate_samples_as_the_record_says(sd_pipe: StableDiffusionPipeline) -> None:
    before = sd_pipe.scheduler
    record = Sampling("ddpm", 3.0, 2, seeds=(1, 2), batch_size=1)
    found = localctl.generate(sd_pipe, "a", sampling=record, **LATENT)
    assert sd_pipe.scheduler is before and found.seeds == (1, 2)
    single = localctl.generate(sd_pipe, "a", seeds=2, sampling=record, **LATENT).images[0]
    assert torch.equal(single, found.images[1])
    other = localctl.generate(sd_pipe, "a", sampling=record, guidance_scale=5.0, **LATENT).images[0]
    assert not torch.equal(other, found.images[0])
    sd_pipe.scheduler = DDPMScheduler.from_config({**before.config, "clip_sample": False})
    said: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, **LATENT}
    assert torch.equal(localctl.generate(sd_pipe, "a", seeds=1, **said).images[0], found.images[0])


def test_a_known_base_is_sampled_with_its_own_guidance_scale() -> None:
    pipe = localctl.load_pipeline("micro")
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 1, **LATENT}
    own = localctl.generate(pipe, "a red circle", seeds=1, **call).images[0]
    assert torch.equal(own, localctl.generate(pipe, "a red circle", seeds=1, guidance_scale=2.0, **call).images[0])
    noise = initial_noise(pipe, 1, 128, 128)
    assert not torch.equal(own, pipe("a red circle", latents=noise, guidance_scale=7.5, **call).images[0])
