from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import rounding

from localctl import losses
from localctl.diffusion import PREDICTION_TYPES, DiffusionSample, add_noise
from localctl.losses import LossConfig, local_control_loss, masked_mean, schedule_weight
from localctl.settings import NORMALISE

GOLDEN = Path(__file__).parent / "goldens" / "losses.npz"
ALPHAS = torch.linspace(0.9991, 0.0047, 1000)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def batch(size: tuple[int, int] = (16, 12), timesteps: tuple[int, ...] = (40, 500, 940)) -> DiffusionSample:
    g = torch.Generator().manual_seed(1)
    shape = (len(timesteps), 4, *size)
    return add_noise(torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.tensor(timesteps), ALPHAS)


def off_by(sample: DiffusionSample, amount: float = 0.1) -> torch.Tensor:
    return sample.noise + amount * torch.randn(sample.noise.shape, generator=torch.Generator().manual_seed(2))


def half_mask(sample: DiffusionSample, factor: int = 8) -> torch.Tensor:
    b, _, h, w = sample.latents.shape
    mask = torch.zeros(b, 1, h * factor, w * factor)
    mask[..., : w * factor // 2] = 1
    return mask


@pytest.mark.parametrize("filter_name", ["mse", "sobel", "laplacian"])
@pytest.mark.parametrize("schedule", ["constant", "step_unit", "time_unit"])
def test_equals_the_published_loss(golden: dict[str, torch.Tensor], filter_name: str, schedule: str) -> None:
    # The published mse loss drops its weight of 1e-3 under time_unit; here every combination has its weight.
    weight = 1.0 if (filter_name, schedule) == ("mse", "time_unit") else 1e-3
    config = LossConfig(filter=filter_name, schedule=schedule, normalise="map", mask_resize="nearest", weight=weight)
    sample = DiffusionSample(golden["latents"], golden["noise"], golden["noisy_latents"], golden["timesteps"])
    terms = local_control_loss(
        sample, golden["model_pred"], golden["mask"], golden["alphas_cumprod"], "epsilon", config
    )
    name = f"{filter_name}.{schedule}"
    torch.testing.assert_close(terms.total, golden[f"{name}.loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.denoising.mean(), golden[f"{name}.simple"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.local.mean(), golden[f"{name}.pred_x0"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.predicted_x0, golden["x0"], rtol=1e-5, atol=1e-5)


def test_masked_denoising_error_of_the_published_code(golden: dict[str, torch.Tensor]) -> None:
    error = (golden["model_pred"] - golden["noise"]).square()
    mask = torch.nn.functional.interpolate(golden["mask"], size=error.shape[-2:])
    per_channel = torch.stack([masked_mean(error[:, c : c + 1], mask, "map").mean() for c in range(error.shape[1])])
    torch.testing.assert_close(per_channel, golden["masked_mse_per_channel"], rtol=1e-5, atol=0.0)


def test_snr_schedule_takes_back_the_growth_of_the_error() -> None:
    timesteps = torch.arange(1000)
    config = LossConfig(schedule="snr", snr_cap=5.0)
    weight = schedule_weight(config, timesteps, ALPHAS)
    expected = torch.minimum(ALPHAS / (1 - ALPHAS), torch.tensor(5.0))
    torch.testing.assert_close(weight, expected)
    # Uncapped, the same error of epsilon weighs the same at every t under the mse filter.
    sample = batch(timesteps=(300, 500, 940))
    output = sample.noise + 0.1
    config = LossConfig(filter="mse", schedule="snr", weight=1.0)
    local = local_control_loss(sample, output, half_mask(sample), ALPHAS, "epsilon", config).local
    torch.testing.assert_close(local, torch.full((3,), 0.01), rtol=1e-3, atol=0)


def test_step_unit_includes_both_ends() -> None:
    config = LossConfig(schedule="step_unit", t_min=200, t_max=300)
    weight = schedule_weight(config, torch.tensor([199, 200, 300, 301]), ALPHAS)
    assert weight.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("filter_name", list(losses.FILTERS))
def test_a_perfect_model_has_no_loss(prediction_type: str, filter_name: str) -> None:
    sample = batch()
    target = losses.training_target(sample, ALPHAS, prediction_type)
    terms = local_control_loss(
        sample, target, half_mask(sample), ALPHAS, prediction_type, LossConfig(filter=filter_name, weight=1.0)
    )
    assert terms.denoising.abs().max() == 0
    assert terms.local.abs().max() < 1e-6


def test_only_the_masked_part_counts() -> None:
    sample = batch()
    x0 = sample.latents.clone()
    x0[..., 8:] += torch.randn(x0[..., 8:].shape, generator=torch.Generator().manual_seed(3))  # mask ends at column 6
    for filter_name in ("mse", "sobel"):
        config = LossConfig(filter=filter_name, weight=1.0)
        inside = local_control_loss(sample, x0, half_mask(sample), ALPHAS, "sample", config)
        outside = local_control_loss(sample, x0, 1 - half_mask(sample), ALPHAS, "sample", config)
        assert inside.local.max() == 0
        assert outside.local.min() > 0.01


def test_mask_normalisation_makes_small_and_large_masks_count_alike() -> None:
    sample = batch(size=(16, 16))
    x0 = sample.latents + 0.5  # the same error everywhere
    small, large = torch.zeros(3, 1, 128, 128), torch.ones(3, 1, 128, 128)
    small[..., :32, :64] = 1  # an eighth
    per_mask = [
        local_control_loss(sample, x0, m, ALPHAS, "sample", LossConfig(filter="mse", weight=1.0)).local
        for m in (small, large)
    ]
    torch.testing.assert_close(per_mask[0], per_mask[1])
    config = LossConfig(filter="mse", weight=1.0, normalise="map")
    per_map = local_control_loss(sample, x0, small, ALPHAS, "sample", config).local
    torch.testing.assert_close(per_map, per_mask[1] / 8)


def test_soft_mask_is_a_weighted_mean() -> None:
    error = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]])  # (1,2,1,2)
    mask = torch.tensor([[[[1.0, 0.25]]]])
    assert masked_mean(error, mask, "mask").item() == pytest.approx((1.5 * 1 + 3.5 * 0.25) / 1.25)
    assert masked_mean(error, mask, "map").item() == pytest.approx((1.5 * 1 + 3.5 * 0.25) / 2)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_sample_does_not_feel_its_batch(normalise: str) -> None:
    sample = batch()
    output, mask = off_by(sample), half_mask(sample)
    mask[1, :, 40:] = 0
    mask[2] = 0
    config = LossConfig(normalise=normalise, weight=1.0)
    together = local_control_loss(sample, output, mask, ALPHAS, "epsilon", config)
    for i in range(3):
        row = slice(i, i + 1)
        one = DiffusionSample(sample.latents[row], sample.noise[row], sample.noisy[row], sample.timesteps[row])
        alone = local_control_loss(one, output[row], mask[row], ALPHAS, "epsilon", config)
        terms = sample.latents[0].numel() + 25  # of the mean, and of the filter
        torch.testing.assert_close(alone.total, together.total[row], rtol=rounding(terms), atol=0)


@pytest.mark.parametrize("filter_name", ["mse", "sobel", "laplacian"])
def test_empty_mask_gives_zero_and_no_gradient(filter_name: str) -> None:
    sample = batch()
    output = off_by(sample).requires_grad_()
    terms = local_control_loss(
        sample, output, torch.zeros(3, 1, 128, 96), ALPHAS, "epsilon", LossConfig(filter=filter_name)
    )
    assert terms.local.tolist() == [0, 0, 0] and terms.denoising.min() > 0
    (gradient,) = torch.autograd.grad(terms.local.sum(), output)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("filter_name", ["mse", "sobel", "laplacian"])
def test_gradients_are_finite_on_flat_input(filter_name: str) -> None:
    flat = torch.zeros(2, 4, 8, 8)
    sample = add_noise(flat, flat, torch.tensor([10, 900]), ALPHAS)
    output = flat.clone().requires_grad_()
    terms = local_control_loss(
        sample, output, torch.ones(2, 1, 64, 64), ALPHAS, "epsilon", LossConfig(filter=filter_name)
    )
    terms.total.sum().backward()
    assert output.grad is not None and torch.isfinite(output.grad).all()


def test_none_is_the_denoising_loss_alone() -> None:
    sample = batch()
    output = off_by(sample)
    terms = local_control_loss(sample, output, half_mask(sample), ALPHAS, "epsilon", LossConfig(filter="none"))
    assert terms.local.tolist() == terms.local_raw.tolist() == [0, 0, 0]
    torch.testing.assert_close(terms.total, (output - sample.noise).square().mean(dim=(1, 2, 3)))


def test_terms_and_weight() -> None:
    sample = batch()
    output = off_by(sample)
    config = LossConfig(schedule="time_unit", weight=0.02)
    terms = local_control_loss(sample, output, half_mask(sample), ALPHAS, "epsilon", config)
    torch.testing.assert_close(terms.local, 0.02 * (1 - ALPHAS[sample.timesteps]) * terms.local_raw)
    assert torch.equal(terms.total, terms.denoising + terms.local)
    assert terms.predicted_x0.shape == sample.latents.shape
    assert LossConfig().normalise == "mask" and LossConfig().weight == 1e-3


def test_half_precision_inputs_are_computed_in_float32() -> None:
    sample = batch(timesteps=(999, 999))
    half = DiffusionSample(sample.latents.half(), sample.noise.half(), sample.noisy.half(), sample.timesteps)
    output = 40 * off_by(sample)  # z0' errors of some hundreds: their square overflows float16
    config = LossConfig(filter="laplacian", weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = local_control_loss(half, output.half(), half_mask(sample), ALPHAS, "epsilon", config)
    wide = local_control_loss(sample, output, half_mask(sample), ALPHAS, "epsilon", config)
    assert terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.total, wide.total, rtol=5e-3, atol=0)


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (8, 12)])
def test_masks_of_any_size_and_shape(size: tuple[int, int]) -> None:
    sample = batch(size=(8, 12))
    terms = local_control_loss(sample, off_by(sample), torch.ones(3, 1, *size), ALPHAS, "epsilon", LossConfig())
    full = local_control_loss(sample, off_by(sample), torch.ones(3, 1, 8, 12), ALPHAS, "epsilon", LossConfig())
    assert torch.equal(terms.total, full.total)


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 1, 64, 96), (3, 3, 64, 96)])
def test_wrong_mask_shape_is_one_sentence(shape: tuple[int, ...]) -> None:
    sample = batch(size=(8, 12))
    with pytest.raises(ValueError, match=r"must have shape \(3, 1, H, W\)"):
        local_control_loss(sample, sample.noise, torch.ones(shape), ALPHAS, "epsilon", LossConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": "canny"}, "filter 'canny'; choose one of none, mse, sobel, laplacian"),
        ({"schedule": "linear"}, "schedule 'linear'"),
        ({"normalise": "batch"}, "normalise 'batch'"),
        ({"mask_resize": "bilinear"}, "mask_resize 'bilinear'"),
        ({"weight": -1.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"t_min": 600, "t_max": 500}, "t_min=600"),
        ({"snr_cap": 0.0}, "snr_cap"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


def test_the_local_term_can_be_learned() -> None:
    sample = batch(timesteps=(50, 300, 600, 900))
    output = off_by(sample, 1.0).requires_grad_()
    optimizer = torch.optim.Adam([output], lr=0.02)
    config = LossConfig(schedule="snr", weight=1.0)
    history = []
    for _ in range(60):
        terms = local_control_loss(sample, output, half_mask(sample), ALPHAS, "epsilon", config)
        optimizer.zero_grad()
        terms.local.mean().backward()
        optimizer.step()
        history.append(terms.local.mean().item())
    assert history[-1] < 0.5 * history[0]


@pytest.fixture(scope="module")
def training_golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN.with_name("training.npz"), allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def golden_terms(golden: dict[str, torch.Tensor], mask: torch.Tensor, **settings: object) -> losses.LossTerms:
    config = LossConfig(normalise="map", mask_resize="nearest", **settings)
    sample = DiffusionSample(golden["latents"], golden["noise"], golden["noisy_latents"], golden["timesteps"])
    return local_control_loss(sample, golden["model_pred"], mask, golden["alphas_cumprod"], "epsilon", config)


@pytest.mark.parametrize("filter_name", ["mse", "sobel", "laplacian"])
def test_equals_the_published_loss_under_a_soft_mask(
    golden: dict[str, torch.Tensor], training_golden: dict[str, torch.Tensor], filter_name: str
) -> None:
    """With a weight of the denoising term, too."""
    mask, weight = training_golden["mask"], training_golden["denoising_weight"].item()
    assert ((mask > 0.1) & (mask < 0.9)).float().mean() > 0.5
    options = {"filter": filter_name, "weight": 1e-3, "denoising_weight": weight}
    terms = golden_terms(golden, mask, squared_mask=True, **options)
    torch.testing.assert_close(terms.total, training_golden[f"{filter_name}.loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.local.mean(), training_golden[f"{filter_name}.pred_x0"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.denoising.mean(), training_golden[f"{filter_name}.simple"], rtol=1e-5, atol=0)
    ours = golden_terms(golden, mask, **options)
    assert (ours.local > 1.05 * terms.local).all()  # m, not m^2


def test_masked_denoising_is_the_published_masked_loss(
    golden: dict[str, torch.Tensor], training_golden: dict[str, torch.Tensor]
) -> None:
    for mask, expected in (
        (golden["mask"], golden["masked_mse_per_channel"]),
        (training_golden["mask"], training_golden["masked_mse_per_channel"]),
    ):
        terms = golden_terms(golden, mask, filter="none", mask_denoising=True, squared_mask=True)
        torch.testing.assert_close(terms.total.mean(), expected.mean(), rtol=1e-5, atol=0)
        assert terms.local.tolist() == [0, 0, 0]


def test_masked_denoising_feels_nothing_outside() -> None:
    sample, mask = batch(), half_mask(batch())
    output = off_by(sample).requires_grad_()
    for normalise in NORMALISE:
        config = LossConfig(filter="none", mask_denoising=True, normalise=normalise)
        (gradient,) = torch.autograd.grad(
            local_control_loss(sample, output, mask, ALPHAS, "epsilon", config).total.sum(), output
        )
        assert gradient[..., 6:].abs().max() == 0 and gradient[..., :6].abs().min() > 0  # the mask ends at column 6


def test_the_weight_of_the_denoising_term() -> None:
    sample, output = batch(), off_by(batch())
    one, half, none = (
        local_control_loss(sample, output, half_mask(sample), ALPHAS, "epsilon", LossConfig(denoising_weight=weight))
        for weight in (1.0, 0.5, 0.0)
    )
    assert torch.equal(half.denoising, 0.5 * one.denoising) and torch.equal(half.local, one.local)
    assert torch.equal(none.total, none.local) and one.local.min() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_weight": -1.0}, "loss.denoising_weight"),
        ({"denoising_weight": float("nan")}, "loss.denoising_weight"),
        ({"denoising_weight": 0.0, "filter": "none"}, "The loss is always 0"),
        ({"denoising_weight": 0.0, "weight": 0.0}, "The loss is always 0"),
    ],
)
def test_a_loss_of_nothing_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)
