"""Measure how a base uses the words of a caption: in the error of its prediction and in its text encoder's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from localctl.diffusion import add_noise, encode, predict_x0, training_target
from localctl.images import to_pixels
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.micro.scenes import COLORS, SHAPES, Scene, article
from localctl.pipelines import BaseConfig, load_pipeline
from localctl.seeding import noise
from research.harness import first_scenes

WORDS: dict[str, tuple[str, ...]] = {"shape": tuple(SHAPES), "color": tuple(COLORS)}


@dataclass(frozen=True)
class Use:
    """How much a base uses the words of one kind.

    told_apart: share of scenes whose own word gives the smallest error of all eight (chance 0.125). worse: relative
    increase of the mean squared error with a wrong word.
    """

    told_apart: Interval
    worse: Interval


def caption(item: Scene, **changes: str) -> str:
    """Return a caption of the scene's one object and background, with ``changes`` of its shape or color."""
    words = {"shape": item.objects[0].shape, "color": item.objects[0].color, **changes}
    return f"{article(words['color'] + ' ' + words['shape'])} on {article(item.background)} background"


@torch.no_grad()
def predictions(
    pipe: StableDiffusionPipeline, item: Scene, captions: Sequence[str], timestep: int
) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of the U-Net's output for each caption, (captions,), with the same noise, and the
    predicted clean latents (captions, 4, h, w)."""
    pixels = to_pixels(Image.fromarray(item.image))[None]
    latents = encode(pipe.vae, pixels)
    sampled = noise(latents.shape, 0, "words", item.index, timestep)
    alphas = pipe.scheduler.alphas_cumprod
    sample = add_noise(latents, sampled, torch.tensor([timestep]), alphas)
    target = training_target(sample, alphas, pipe.scheduler.config.prediction_type)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    states = pipe.text_encoder(pipe.tokenizer(list(captions), **options).input_ids)[0]  # (captions, 77, width)
    noisy = sample.noisy.expand(len(captions), -1, -1, -1)
    output = pipe.unet(noisy, timestep, states).sample
    kind = pipe.scheduler.config.prediction_type
    z0 = predict_x0(noisy, output, torch.full((len(captions),), timestep), alphas, kind)
    return (output - target).square().mean((1, 2, 3)), z0


def use_of_words(pipe: StableDiffusionPipeline, scenes: Sequence[Scene], timestep: int) -> dict[str, Use]:
    """Return the use of shapes and of colours, with 95 % bootstrap intervals over the scenes."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in WORDS}
    for item in tqdm(scenes, desc=f"t = {timestep}", unit="scene"):
        for kind, words in WORDS.items():
            error, _ = predictions(pipe, item, [caption(item, **{kind: word}) for word in words], timestep)
            own = words.index(getattr(item.objects[0], kind))
            wrong = (error.sum() - error[own]) / (len(words) - 1)
            found[kind].append((float(error.argmin() == own), float(wrong / error[own] - 1)))
    columns = {kind: np.array(rows).T for kind, rows in found.items()}
    return {kind: Use(bootstrap(told), bootstrap(worse)) for kind, (told, worse) in columns.items()}


@torch.no_grad()
def shares_of_words(pipe: StableDiffusionPipeline) -> dict[str, float]:
    """Return the shares of the variance of the text states at the shape's word that shape and colour explain.

    The variance is over the captions of all colours and shapes; each share is that of the means over the other word.
    """
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    captions = [f"a {color} {shape} on a black background" for color in COLORS for shape in SHAPES]
    states = pipe.text_encoder(pipe.tokenizer(captions, **options).input_ids)[0]  # (captions, 77, width)
    grid = states[:, 3].unflatten(
        0, (len(COLORS), len(SHAPES))
    )  # position 3: after the start token, "a" and the colour
    whole = float((grid - grid.mean((0, 1))).square().mean((0, 1)).sum())
    parts = {"shape": grid.mean(0), "color": grid.mean(1)}
    return {kind: float(part.var(0, correction=0).sum()) / whole for kind, part in parts.items()}


def report(base: str, number: int, timesteps: Sequence[int]) -> str:
    """Return the figures of ``number`` scenes as text. Raises ValueError for a base that cannot be loaded."""
    pipe = load_pipeline(BaseConfig(name=base))
    scenes = first_scenes(number, lambda item: len(item.objects) == 1)
    shares = " and ".join(f"{value:.2f} by the {kind}'s" for kind, value in shares_of_words(pipe).items())
    lines = [f"text states at the shape's word: {shares} word"]
    for timestep in timesteps:
        for kind, use in use_of_words(pipe, scenes, timestep).items():
            lines.append(f"{timestep:5}  {kind:6}  told apart {use.told_apart}  a wrong word adds {use.worse}")
    return "\n".join(lines)
