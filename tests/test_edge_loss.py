"""The local term that compares edges of the decoded image with the condition, and the weight inside the mask."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from localctl.conditions import extract
from localctl.diffusion import DiffusionSample, add_noise
from localctl.losses import EdgeTarget, edge_loss, local_control_loss, schedule_weight, soft_edges
from localctl.metrics.edges import edge_scores
from localctl.settings import ConditionConfig, LossConfig

ALPHAS = torch.linspace(0.9991, 0.0047, 1000)
CANNY = ConditionConfig(kind="canny")
SIZE = 64


def image(center: tuple[int, int] = (30, 34), radius: int = 16) -> np.ndarray:
    array = np.full((SIZE, SIZE, 3), 40, np.uint8)
    cv2.circle(array, center, radius, (200, 180, 90), -1, cv2.LINE_AA)
    return array


def pixels_of(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, 0)[None].float() / 127.5 - 1


def edges_of(array: np.ndarray, config: ConditionConfig = CANNY) -> Tensor:
    return extract(config, array)[None]


FULL = torch.ones(1, 1, SIZE, SIZE)


@pytest.mark.parametrize("channels", ["gray", "rgb"])
def test_soft_edges_are_where_canny_finds_edges(channels: str) -> None:
    config = ConditionConfig(kind="canny", channels_used=channels)  # type: ignore[arg-type]
    found, wanted = soft_edges(pixels_of(image()), config), edges_of(image(), config)
    scores = edge_scores(found[0, 0].numpy() > 0.5, wanted[0, 0].numpy() > 0.5, np.ones((SIZE, SIZE)), 1.5)
    assert scores.precision == 1 and scores.recall == 1
    assert not (soft_edges(torch.zeros(1, 3, SIZE, SIZE), config) > 0.01).any()


def test_the_sobel_condition_is_computed_on_its_own_scale() -> None:
    config = ConditionConfig(kind="sobel")
    torch.testing.assert_close(soft_edges(pixels_of(image()), config), edges_of(image(), config), rtol=0, atol=0.01)


def test_the_term_grows_as_edges_move_away_and_its_gradient_moves_them_back() -> None:
    wanted = edges_of(image())
    losses = [
        float(edge_loss(soft_edges(pixels_of(image((30 + shift, 34))), CANNY), wanted, FULL, (1, 2, 4)))
        for shift in (0, 2, 4, 8)
    ]
    assert losses[0] < 0.15 and losses == sorted(losses) and losses[-1] > 0.5
    blurred = pixels_of(cv2.GaussianBlur(image((33, 34)), (0, 0), 2)).requires_grad_()
    before = edge_loss(soft_edges(blurred, CANNY), wanted, FULL, (1, 2, 4))
    gradient = torch.autograd.grad(before.sum(), blurred)[0]
    assert gradient.isfinite().all() and gradient.any()
    after = edge_loss(soft_edges(blurred - 0.05 * gradient / gradient.abs().max(), CANNY), wanted, FULL, (1, 2, 4))
    assert after < before


def test_it_is_the_score_of_the_edges_where_they_are_certain() -> None:
    found, wanted = edges_of(image((33, 34))), edges_of(image())
    square = np.ones((5, 5), np.uint8)  # tolerance in rows and columns
    near_wanted, near_found = (cv2.dilate(item[0, 0].numpy(), square) > 0 for item in (wanted, found))
    precision = float((found[0, 0].numpy() * near_wanted).sum() / found.sum())
    recall = float((wanted[0, 0].numpy() * near_found).sum() / wanted.sum())
    expected = 1 - 2 * precision * recall / (precision + recall)
    assert float(edge_loss(found, wanted, FULL, (2,))) == pytest.approx(expected, abs=1e-4)


def test_edges_outside_the_mask_do_not_count_and_without_a_wanted_edge_inside_it_is_zero() -> None:
    mask = FULL.clone()
    mask[..., SIZE // 2 :] = 0
    other = image()
    other[:, SIZE // 2 + 8 :] = 255
    wanted = edges_of(image())
    both = [edge_loss(soft_edges(pixels_of(some), CANNY), wanted, mask, (1, 2)) for some in (image(), other)]
    torch.testing.assert_close(*both)
    flat = pixels_of(image()).requires_grad_()
    nothing = edge_loss(soft_edges(flat, CANNY), torch.zeros_like(wanted), mask, (1, 2))
    assert float(nothing) == 0 and not torch.autograd.grad(nothing.sum(), flat)[0].any()


def edge_terms(sample: DiffusionSample, output: Tensor, config: LossConfig, seen: list[int]) -> Tensor:
    condition = edges_of(image()).expand(len(output), -1, -1, -1)

    def decode(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="bilinear")

    mask = FULL.expand(len(output), -1, -1, -1)
    terms = local_control_loss(sample, output, mask, ALPHAS, "epsilon", config, EdgeTarget(condition, CANNY, decode))
    assert torch.equal(terms.local, config.weight * schedule_weight(config, sample.timesteps, ALPHAS) * terms.local_raw)
    return terms.local


def test_only_rows_of_low_noise_are_decoded_and_each_row_is_its_own() -> None:
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    sample = add_noise(latents, noise, torch.tensor([900, 100, 999, 300]), ALPHAS)
    output = (noise + 0.1 * torch.randn(noise.shape, generator=g)).requires_grad_()
    config = LossConfig(filter="edges", schedule="low_noise", snr_min=0.5, weight=0.2)
    seen: list[int] = []
    local = edge_terms(sample, output, config, seen)
    assert seen == [2] and not local[[0, 2]].any() and (local[[1, 3]] > 0).all()
    gradient = torch.autograd.grad(local.sum(), output)[0]
    assert not gradient[[0, 2]].any() and gradient[1].any() and gradient[3].any()
    one = DiffusionSample(*(part[3:] for part in (sample.latents, sample.noise, sample.noisy, sample.timesteps)))
    torch.testing.assert_close(edge_terms(one, output[3:], config, seen), local[3:])
    high = LossConfig(filter="edges", schedule="low_noise", snr_min=1e9)
    assert not edge_terms(sample, output, high, seen).any() and seen == [2, 1]  # nothing was decoded


def test_low_noise_begins_at_the_ratio_that_is_asked_for() -> None:
    timesteps = torch.arange(1000)
    weight = schedule_weight(LossConfig(schedule="low_noise", snr_min=0.25), timesteps, ALPHAS)
    assert torch.equal(weight.bool(), ALPHAS / (1 - ALPHAS) >= 0.25) and 0 < weight.sum() < 1000


def test_the_margin_leaves_out_the_border_of_the_mask() -> None:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 10:50, 10:50] = 1
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=g)
    sample = add_noise(latents, torch.randn(latents.shape, generator=g), torch.tensor([10]), ALPHAS)
    condition = torch.zeros(1, 1, SIZE, SIZE)
    condition[..., 11, 10:50] = condition[..., 30, 10:50] = 1  # one edge at the border, one inside

    def raw(margin: int, pixels: Tensor) -> float:
        config = LossConfig(filter="edges", margin=margin, tolerances=(1,))
        target = EdgeTarget(condition, CANNY, lambda latents: pixels)
        return float(local_control_loss(sample, sample.noise, mask, ALPHAS, "epsilon", config, target).local_raw)

    steps = -torch.ones(1, 3, SIZE, SIZE)
    steps[..., 30:, :] = 1  # has the edge inside alone
    assert raw(2, steps) < 0.1 and raw(0, steps) > 0.25


def test_the_weight_inside_the_mask_is_a_weighted_mean_and_one_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    sample = add_noise(latents, noise, torch.tensor([100, 700]), ALPHAS)
    output = noise + 0.1 * torch.randn(noise.shape, generator=g)
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, :, :32] = 1  # half of the first sample, nothing of the second

    def denoising(**options: float) -> Tensor:
        return local_control_loss(
            sample,
            output,
            mask,
            ALPHAS,
            "epsilon",
            LossConfig(filter="none", **options),  # type: ignore[arg-type]
        ).denoising

    plain = denoising()
    assert torch.equal(denoising(masked_denoising_weight=1.0), plain)
    error = (output - noise).square().mean(dim=1)
    inside, outside = error[0, :, :4].mean(), error[0, :, 4:].mean()
    torch.testing.assert_close(denoising(masked_denoising_weight=3.0)[0], (3 * inside + outside) / 4)
    torch.testing.assert_close(denoising(masked_denoising_weight=3.0)[1], plain[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "edges", "normalise": "map"}, "leave loss.normalise=mask"),
        ({"filter": "sobel", "margin": 2}, "are of loss.filter=edges, not sobel"),
        ({"filter": "mse", "tolerances": (3,)}, "are of loss.filter=edges, not mse"),
        ({"mask_denoising": True, "masked_denoising_weight": 2.0}, "leave one of them out"),
        ({"tolerances": ()}, "tolerances"),
        ({"filter": "edges", "snr_min": 0.5}, "of loss.schedule=low_noise, not constant"),
        ({"filter": "edges", "squared_mask": True}, "no effect on loss.filter=edges"),
    ],
)
def test_settings_without_effect_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)
