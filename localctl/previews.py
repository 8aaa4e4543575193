"""Sampling step by step: the image that a model predicts at each step, and how it looks, without decoding it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from localctl.control.latents import Schedule, sigma_at
from localctl.control.methods import wrapped
from localctl.denoisers import denoiser_of
from localctl.diffusion import FLOW, decode, encode, x0_from_eps, x0_from_flow, x0_from_v
from localctl.seeding import numpy_rng

_SMALL_VAE = 5_000_000  # weights; decoding takes about as long as a sampling step of the embedded base
_CELLS, _IMAGES, _DISCS = 16, 8, 8  # of the calibration images: side in latents, number, discs in each


@dataclass(frozen=True)
class SamplingStep:
    """One sampling step of a batch of images, after it.

    step: from 1 to ``of``; a scheduler of second order visits up to two timesteps per step, and each counts. latents:
    z0', the clean latents (B, c, h, w) that the model predicted at this step; None while weights are optimised, before
    sampling.
    """

    step: int
    of: int
    latents: Tensor | None


OnStep = Callable[[SamplingStep], object]


@contextmanager
def each_step(pipe: DiffusionPipeline, on_step: OnStep | None, size: tuple[int, int]) -> Iterator[Callable[[], None]]:
    """Call ``on_step`` after every step of the pipeline's present scheduler; an error that it raises ends the sampling.

    ``size``: (H, W) of the images.

    Yields a function to call before each call of the pipeline, which begins to count anew.
    """
    if on_step is None:
        yield lambda: None
        return
    scheduler, schedule = pipe.scheduler, Schedule()
    denoiser = denoiser_of(pipe)
    count = 0

    @contextmanager
    def within(arguments: Mapping[str, Any]) -> Iterator[None]:
        nonlocal count
        times = schedule.times(scheduler)
        sigma = sigma_at(scheduler, schedule.time(scheduler, arguments["timestep"]), times)  # the step moves its index
        yield
        count += 1
        clean = _clean(arguments["model_output"], arguments["sample"], sigma, scheduler, denoiser.prediction_type)
        of = getattr(pipe, "_num_timesteps", None) or len(times)
        on_step(SamplingStep(count, of, denoiser.unpacked(clean, size)))

    def begin() -> None:
        nonlocal count
        count = 0

    watching: AbstractContextManager[None] = wrapped(scheduler, "step", before=lambda arguments: None, within=within)
    with watching:
        yield begin


def _clean(output: Tensor, sample: Tensor, sigma: float, scheduler: Any, prediction_type: str) -> Tensor:
    """Return the predicted z0' of a step; ``sample`` has the scale of the scheduler."""
    if prediction_type == FLOW:
        return x0_from_flow(sample, output, torch.tensor(sigma / (1 + sigma)))
    abar = torch.tensor(1 / (1 + sigma**2))
    if float(scheduler.init_noise_sigma) != 1:  # x = z / sqrt(abar)
        sample = sample * math.sqrt(float(abar))
    if prediction_type == "sample":
        return output
    return (x0_from_v if prediction_type == "v_prediction" else x0_from_eps)(sample, output, abar)


class LatentPreview:
    """What latents show, at little cost.

    A small VAE, such as the embedded base's, decodes them. For others it is a linear map from latent channels to RGB,
    fitted once, by least squares in closed form: the VAE's latents of images of coloured discs, against the mean colour
    of the pixels that each latent covers. It shows colours and places, no details.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._vae, self._factor = pipe.vae, int(pipe.vae_scale_factor)
        self._map: Tensor | None = None
        if sum(parameter.numel() for parameter in pipe.vae.parameters()) <= _SMALL_VAE:
            return
        pixels = _calibration_images(_CELLS * self._factor)
        with torch.no_grad():
            latents = torch.cat([encode(pipe.vae, image[None].to(pipe.vae.device)).cpu() for image in pixels])
        colours = torch.nn.functional.avg_pool2d(pixels, self._factor)
        rows, wanted = (item.movedim(1, -1).flatten(0, 2).double() for item in (latents, colours))
        self._map = torch.linalg.lstsq(_with_one(rows), wanted).solution.float()  # (c + 1, 3)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Return an image of the full size for each of the clean latents (B, c, h, w)."""
        if self._map is None:
            pixels = decode(self._vae, latents.detach()).float().cpu()
        else:
            pixels = (_with_one(latents.detach().float().cpu().movedim(1, -1)) @ self._map).movedim(-1, 1)
            pixels = torch.nn.functional.interpolate(pixels, scale_factor=self._factor, mode="bilinear")
        values = ((pixels / 2 + 0.5).nan_to_num(0).clamp(0, 1) * 255).round().byte().movedim(1, -1)
        return [Image.fromarray(item.numpy()) for item in values]


def _with_one(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)


def _calibration_images(side: int) -> Tensor:
    """Return images (n, 3, side, side) in [-1, 1]: discs of random colours that cover each other, a simple model of the
    surfaces in photos (dead leaves)."""
    rng = numpy_rng(0, "preview")
    images = np.empty((_IMAGES, side, side, 3), np.uint8)
    for image in images:
        image[:] = rng.integers(256, size=3)
        for _ in range(_DISCS):
            (x, y), radius = rng.integers(side, size=2).tolist(), int(side * rng.uniform(1 / 8, 0.45))
            cv2.circle(image, (x, y), radius, rng.integers(256, size=3).tolist(), -1)
    return torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
