"""Mask and local control loss in figures: features, z_t, z0', the maps of filters, what counts in the mask, over t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from localctl import diffusion
from localctl.adapter import LocalAdapter
from localctl.data import Example
from localctl.diffusion import DiffusionSample, add_noise, predict_x0
from localctl.drawing import grid, heat_colors, outline
from localctl.evaluation.plots import curves
from localctl.images import condition_to_pil, to_pil
from localctl.losses import FILTERS, LossConfig, LossTerms, local_control_loss, schedule_weight
from localctl.masks import resize_mask
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.pipelines import is_xl
from localctl.seeding import noise
from localctl.settings import Schedule
from localctl.training.models import encode_text, time_ids, unet_arguments

COLUMNS = ("z_t", "z0'", "filter of z0", "filter of z0'", "difference in mask")


@dataclass(frozen=True)
class Prediction:
    """One example at T timesteps, with the same noise. sample: T rows. output (T,c,h,w): of the U-Net."""

    example: Example
    sample: DiffusionSample
    output: Tensor
    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def predicted_x0(self) -> Tensor:
        """z0' (T,c,h,w), float32."""
        schedule = (self.sample.timesteps, self.alphas_cumprod, self.prediction_type)
        return predict_x0(self.sample.noisy.float(), self.output.float(), *schedule)

    def terms(self, config: LossConfig) -> LossTerms:
        """Return what the loss makes of it, one row per timestep."""
        assert self.example.mask is not None
        masks = self.example.mask[None].expand(len(self.output), -1, -1, -1)  # (T,1,H,W)
        return local_control_loss(self.sample, self.output, masks, self.alphas_cumprod, self.prediction_type, config)


@torch.no_grad()
def predict(
    pipe: DiffusionPipeline,
    example: Example,
    timesteps: Sequence[int],
    adapter: LocalAdapter | None = None,
    seed: int = 0,
) -> Prediction:
    """Return what the frozen base, with an adapter or alone, predicts of ``example`` noised to each of ``timesteps``.

    ValueError when a timestep is not one of the base's, or the example has no mask yet.
    """
    alphas = pipe.scheduler.alphas_cumprod.float()
    if not timesteps or not all(0 <= t < len(alphas) for t in timesteps):
        raise ValueError(f"The timesteps must lie from 0 to {len(alphas) - 1}, at least one, not {list(timesteps)}.")
    if example.mask is None:
        raise ValueError(f"The example {example.key} has no mask; take it from MaskedSamples.")
    count = len(timesteps)
    latents = diffusion.encode(pipe.vae, example.pixels[None]).expand(count, -1, -1, -1)  # (T,c,h,w)
    same = noise(latents.shape[1:], seed, "noise", example.key).to(latents).expand_as(latents)
    sample = add_noise(latents, same, torch.tensor(timesteps, device=latents.device), alphas)
    arguments = unet_arguments(encode_text(pipe, example.caption), _ids(pipe, example))
    if adapter is not None:
        x = torch.cat([example.condition, example.mask])[None].to(adapter.device, adapter.dtype)  # (1,C+1,H,W)
        features = [f.to(pipe.unet.device, pipe.unet.dtype) for f in adapter(x)]
        arguments["down_intrablock_additional_residuals"] = [f.expand(count, -1, -1, -1) for f in features]
    arguments = {name: _repeated(value, count) for name, value in arguments.items()}
    output = pipe.unet(sample.noisy.to(pipe.unet.dtype), sample.timesteps, **arguments).sample
    return Prediction(example, sample, output, alphas, pipe.scheduler.config.prediction_type)


def _ids(pipe: DiffusionPipeline, example: Example) -> Tensor | None:
    height, width = example.pixels.shape[-2:]
    return time_ids([example.original], (height, width)) if is_xl(pipe) else None


def _repeated(value: Any, count: int) -> Any:
    """Tensors of one row as ``count`` rows; lists (of features) are there already."""
    if isinstance(value, Tensor):
        return value.expand(count, *value.shape[1:])
    return {name: _repeated(item, count) for name, item in value.items()} if isinstance(value, Mapping) else value


def loss_sheet(pipe: DiffusionPipeline, prediction: Prediction, config: LossConfig, side: int = 128) -> Image.Image:
    """One row per timestep: z_t and z0' through the decoder, the filter's maps of z0 and z0', and their squared
    difference times the mask, with w(t) and the local term in words; under it the example with the mask's outline.

    Maps are means over the channels of the latents; the two filtered ones share one scale over all rows, so that they
    can be compared, and each difference has its own. ValueError for a loss without a filter.
    """
    edges = FILTERS[config.filter]
    if edges is None:
        raise ValueError("The loss has no filter, so there is nothing to show; choose sobel, laplacian or mse.")
    example, sample, predicted = prediction.example, prediction.sample, prediction.predicted_x0
    assert example.mask is not None
    maps = [edges(latents.float()).abs() for latents in (sample.latents, predicted)]  # (T,c,h,w)
    small = resize_mask(example.mask[None], (maps[0].shape[-2], maps[0].shape[-1]), config.mask_resize).to(maps[0])
    errors = (maps[1] - maps[0]).square() * small
    top = float(maps[0].mean(1).max())  # of the true latents: z0' of pure noise would darken all others
    weights = schedule_weight(config, sample.timesteps, prediction.alphas_cumprod)
    local = prediction.terms(config).local
    rows, labels = [], []
    for i, t in enumerate(sample.timesteps.tolist()):
        decoded = [decode(pipe, latents[i : i + 1]).resize((side, side)) for latents in (sample.noisy, predicted)]
        shown = [map_to_pil(m[i].mean(0), side, top) for m in maps]
        rows.append([*decoded, *shown, map_to_pil(errors[i].mean(0), side)])
        labels.append(f"t = {t}   w(t) = {weights[i]:.3g}   local term = {local[i]:.3g}")
    whole = to_pil(example.pixels)
    last = [p.resize((side, side)) for p in (whole, outline(whole, example.mask))]
    return grid([*rows, last], COLUMNS, [*labels, example.caption])


def predicted_sheet(pipe: DiffusionPipeline, predictions: Mapping[str, Prediction], side: int = 128) -> Image.Image:
    """z0' of one example through the decoder, with the mask's outline: one row per way to predict it, one column per
    timestep, after the example itself."""
    first = next(iter(predictions.values()))
    assert first.example.mask is not None
    truth = outline(to_pil(first.example.pixels), first.example.mask).resize((side, side))
    rows = []
    for prediction in predictions.values():
        decoded = [decode(pipe, latents[None]) for latents in prediction.predicted_x0]
        rows.append([truth, *(outline(p, first.example.mask).resize((side, side)) for p in decoded)])
    times = [f"z0', t = {t}" for t in first.sample.timesteps.tolist()]
    return grid(rows, ["the scene", *times], list(predictions))


@torch.no_grad()
def feature_sheet(adapter: LocalAdapter, example: Example, side: int = 128) -> Image.Image:
    """Return the adapter's features (c_i,h_i,w_i) of one example, one column per level, after the condition: in the
    first row without a mask (all ones), in the second with the example's.

    Shown is the root of the mean square over the channels; both rows of a level share one scale. ValueError when the
    example has no mask yet.
    """
    if example.mask is None:
        raise ValueError(f"The example {example.key} has no mask; take it from MaskedSamples.")
    masks = torch.stack([torch.ones_like(example.mask), example.mask])  # (2,1,H,W)
    x = torch.cat([example.condition.expand(2, -1, -1, -1), masks], dim=1)  # (2,C+1,H,W)
    levels = [f.float().square().mean(1).sqrt() for f in adapter(x.to(adapter.device, adapter.dtype))]  # (2,h,w)
    condition = condition_to_pil(example.condition[:1])
    shown = [condition, outline(condition, example.mask)]
    rows = [
        [shown[i].resize((side, side)), *(map_to_pil(level[i], side, float(level.max())) for level in levels)]
        for i in range(2)
    ]
    return grid(rows, ["condition", *(f"{f.shape[-1]} x {f.shape[-2]} cells" for f in levels)], ["no mask", "mask"])


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: Tensor) -> Image.Image:
    """One scaled latent (1,c,h,w) through the decoder."""
    return to_pil(diffusion.decode(pipe.vae, latents)[0])


def map_to_pil(values: Tensor, side: int, top: float | None = None) -> Image.Image:
    """Return a map (h,w) of values from 0 as a heat map; ``top`` is the brightest, null: the map's own maximum."""
    top = float(values.max()) if top is None else top
    scaled = (values.float().cpu() / max(top, 1e-12) * 255).clamp(0, 255).to(torch.uint8).numpy()
    colored = heat_colors(np.ascontiguousarray(scaled))
    return Image.fromarray(np.ascontiguousarray(colored)).resize((side, side), Image.Resampling.NEAREST)


def schedule_plot(
    alphas_cumprod: Tensor, timesteps: Sequence[int], schedules: Sequence[Schedule], config: LossConfig
) -> Image.Image:
    """w(t) of each schedule, with the other settings of ``config``, over ``timesteps``."""
    t = torch.tensor(timesteps)
    series: dict[str, dict[float, Interval]] = {}
    for name in schedules:
        weights = schedule_weight(replace(config, schedule=name), t, alphas_cumprod).tolist()
        series[name] = {float(x): Interval(w, w, w, 1) for x, w in zip(timesteps, weights, strict=True)}
    return curves(series, "t", "w(t)", logarithmic=False)


def local_plot(predictions: Sequence[Prediction], configs: Mapping[str, LossConfig]) -> Image.Image:
    """Return the local term of each loss over t: means over examples with 95 % bootstrap intervals.

    Every loss is divided by its own largest mean: losses differ in scale, and what matters is where they look.
    """
    series = {}
    for name, config in configs.items():
        table = _local(predictions, config)
        series[name] = _over_t(predictions[0], table / max(float(table.mean(0).max()), 1e-12))
    return curves(series, "t", "local term, share of its largest mean", logarithmic=False)


def compared_plot(predictions: Mapping[str, Sequence[Prediction]], config: LossConfig) -> Image.Image:
    """Return the local term over t of each way to predict the same examples: means with 95 % bootstrap intervals."""
    series = {name: _over_t(made[0], _local(made, config)) for name, made in predictions.items()}
    return curves(series, "t", f"local term, {config.filter}, {config.schedule}", logarithmic=False)


def _local(predictions: Sequence[Prediction], config: LossConfig) -> np.ndarray:
    """(n,T), float64."""
    return torch.stack([p.terms(config).local for p in predictions]).double().cpu().numpy()


def _over_t(prediction: Prediction, table: np.ndarray) -> dict[float, Interval]:
    timesteps = prediction.sample.timesteps.tolist()
    return {float(t): bootstrap(column) for t, column in zip(timesteps, table.T, strict=True)}
