"""Plot the mask and the local control loss: features, z_t, z0', filter maps, and the local term over t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from localctl import diffusion
from localctl.adapter import LocalAdapter
from localctl.data import Example
from localctl.denoisers import denoiser_of
from localctl.diffusion import DiffusionSample, add_noise, predict_x0
from localctl.drawing import grid, heat_colors, outline
from localctl.evaluation.plots import curves
from localctl.images import condition_to_pil, to_pil
from localctl.losses import FILTERS, LossConfig, LossTerms, local_control_loss, schedule_weight
from localctl.masks import resize_mask
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.prompt_embeds import PromptEmbeds
from localctl.seeding import noise
from localctl.settings import Schedule

COLUMNS = ("z_t", "z0'", "filter of z0", "filter of z0'", "difference in mask")


@dataclass(frozen=True)
class Prediction:
    """One example at T timesteps, with the same noise. sample: T rows. output: of the U-Net, (T,c,h,w)."""

    example: Example
    sample: DiffusionSample
    output: Tensor
    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def predicted_x0(self) -> Tensor:
        """The predicted z0', (T,c,h,w) float32."""
        schedule = (self.sample.timesteps, self.alphas_cumprod, self.prediction_type)
        return predict_x0(self.sample.noisy.float(), self.output.float(), *schedule)

    def terms(self, config: LossConfig) -> LossTerms:
        """Return the terms of the loss, one row per timestep."""
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
    """Return the prediction of the frozen base, with an adapter or alone, for ``example`` noised to each timestep.

    Raises:
        ValueError: a timestep is not one of the base's, or the example has no mask.
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
    denoiser, size = denoiser_of(pipe), (example.pixels.shape[-2], example.pixels.shape[-1])
    texts = denoiser.encode_captions([example.caption]) if example.caption else denoiser.empty_caption()
    conditioning = denoiser.conditioning(PromptEmbeds.join([texts] * count), size, [example.original] * count)
    features = None
    if adapter is not None:
        x = adapter.inputs(
            example.condition[None], example.mask[None], lambda pixels: diffusion.encode(pipe.vae, pixels)
        )
        x = x.to(adapter.device, adapter.dtype)  # (1,C+1,H,W)
        features = [f.to(pipe.unet.device, pipe.unet.dtype).expand(count, -1, -1, -1) for f in adapter(x)]
    output = denoiser.output(sample.noisy.to(pipe.unet.dtype), sample.timesteps, conditioning, features)
    return Prediction(example, sample, output, alphas, pipe.scheduler.config.prediction_type)


def loss_sheet(pipe: DiffusionPipeline, prediction: Prediction, config: LossConfig, side: int = 128) -> Image.Image:
    """Return a sheet with a row per timestep, and the example with the mask's outline in the last row.

    The columns are z_t and z0' decoded, the filter's maps of z0 and z0', and their squared difference times the mask.
    Each row is labeled with w(t) and the local term. Maps are means over the channels of the latents; the filter's maps
    share one scale over all rows, each difference has its own.

    Raises:
        ValueError: the loss has no filter.
    """
    edges = FILTERS.get(config.filter)
    if edges is None:
        raise ValueError(
            "The loss has no filter of latents, so nothing can be plotted; choose sobel, laplacian or mse."
        )
    example, sample, predicted = prediction.example, prediction.sample, prediction.predicted_x0
    assert example.mask is not None
    maps = [edges(latents.float()).abs() for latents in (sample.latents, predicted)]  # (T,c,h,w)
    small = resize_mask(example.mask[None], (maps[0].shape[-2], maps[0].shape[-1]), config.mask_resize).to(maps[0])
    errors = (maps[1] - maps[0]).square() * small
    top = float(maps[0].mean(1).max())  # of the true latents: z0' at the largest t would darken all others
    weights = schedule_weight(config, sample.timesteps, prediction.alphas_cumprod)
    local = prediction.terms(config).local
    rows, labels = [], []
    for i, t in enumerate(sample.timesteps.tolist()):
        decoded = [decode(pipe, latents[i : i + 1]).resize((side, side)) for latents in (sample.noisy, predicted)]
        filtered = [map_to_pil(m[i].mean(0), side, top) for m in maps]
        rows.append([*decoded, *filtered, map_to_pil(errors[i].mean(0), side)])
        labels.append(f"t = {t}   w(t) = {weights[i]:.3g}   local term = {local[i]:.3g}")
    whole = to_pil(example.pixels)
    last = [p.resize((side, side)) for p in (whole, outline(whole, example.mask))]
    return grid([*rows, last], COLUMNS, [*labels, example.caption])


def predicted_sheet(pipe: DiffusionPipeline, predictions: Mapping[str, Prediction], side: int = 128) -> Image.Image:
    """Return a sheet of decoded z0' of one example, with the mask's outline.

    It has a row per way to predict z0', and a column per timestep after the example itself.
    """
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
    """Return a sheet of the adapter's features (c_i,h_i,w_i) of one example, a column per level after the condition.

    The first row is without a mask (all ones), the second with the example's. Plotted is the root mean square over the
    channels; both rows of a level share one scale.

    Raises:
        ValueError: the example has no mask.
    """
    if example.mask is None:
        raise ValueError(f"The example {example.key} has no mask; take it from MaskedSamples.")
    masks = torch.stack([torch.ones_like(example.mask), example.mask])  # (2,1,H,W)
    x = torch.cat([example.condition.expand(2, -1, -1, -1), masks], dim=1)  # (2,C+1,H,W)
    levels = [f.float().square().mean(1).sqrt() for f in adapter(x.to(adapter.device, adapter.dtype))]  # (2,h,w)
    condition = condition_to_pil(example.condition[:1])
    conditions = [condition, outline(condition, example.mask)]
    rows = [
        [conditions[i].resize((side, side)), *(map_to_pil(level[i], side, float(level.max())) for level in levels)]
        for i in range(2)
    ]
    return grid(rows, ["condition", *(f"{f.shape[-1]} x {f.shape[-2]} cells" for f in levels)], ["no mask", "mask"])


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: Tensor) -> Image.Image:
    """Decode one scaled latent (1,c,h,w)."""
    return to_pil(diffusion.decode(pipe.vae, latents)[0])


def map_to_pil(values: Tensor, side: int, top: float | None = None) -> Image.Image:
    """Return a map (h,w) of values >= 0 as a heat map; ``top``: the brightest value, None = the map's maximum."""
    top = float(values.max()) if top is None else top
    scaled = (values.float().cpu() / max(top, 1e-12) * 255).clamp(0, 255).to(torch.uint8).numpy()
    colored = heat_colors(np.ascontiguousarray(scaled))
    return Image.fromarray(np.ascontiguousarray(colored)).resize((side, side), Image.Resampling.NEAREST)


def schedule_plot(
    alphas_cumprod: Tensor, timesteps: Sequence[int], schedules: Sequence[Schedule], config: LossConfig
) -> Image.Image:
    """Plot w(t) of each schedule over ``timesteps``, with the other settings of ``config``."""
    t = torch.tensor(timesteps)
    series: dict[str, dict[float, Interval]] = {}
    for name in schedules:
        weights = schedule_weight(replace(config, schedule=name), t, alphas_cumprod).tolist()
        series[name] = {float(x): Interval(w, w, w, 1) for x, w in zip(timesteps, weights, strict=True)}
    return curves(series, "t", "w(t)", logarithmic=False)


def local_plot(predictions: Sequence[Prediction], configs: Mapping[str, LossConfig]) -> Image.Image:
    """Plot the local term of each loss over t: means over examples with 95 % bootstrap intervals.

    Every loss is divided by its own largest mean, because losses differ in scale.
    """
    series = {}
    for name, config in configs.items():
        table = _local(predictions, config)
        series[name] = _over_t(predictions[0], table / max(float(table.mean(0).max()), 1e-12))
    return curves(series, "t", "local term, share of its largest mean", logarithmic=False)


def compared_plot(predictions: Mapping[str, Sequence[Prediction]], config: LossConfig) -> Image.Image:
    """Plot the local term over t of each way to predict the same examples: means with 95 % bootstrap intervals."""
    series = {name: _over_t(made[0], _local(made, config)) for name, made in predictions.items()}
    return curves(series, "t", f"local term, {config.filter}, {config.schedule}", logarithmic=False)


def _local(predictions: Sequence[Prediction], config: LossConfig) -> np.ndarray:
    """Return the local terms (n,T), float64."""
    return torch.stack([p.terms(config).local for p in predictions]).double().cpu().numpy()


def _over_t(prediction: Prediction, table: np.ndarray) -> dict[float, Interval]:
    timesteps = prediction.sample.timesteps.tolist()
    return {float(t): bootstrap(column) for t, column in zip(timesteps, table.T, strict=True)}
