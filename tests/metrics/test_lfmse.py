"""LFMSE and DiffCC against the published numbers, and the errors of the published code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from localctl.metrics.lfmse import LFMSE, DiffCC
from localctl.metrics.per_sample import gray_batch, rgb_batch

GOLDEN = Path(__file__).parents[1] / "goldens" / "metrics.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("method", ["canny", "sobel"])
def test_lfmse_equals_the_published_numbers(golden: dict[str, np.ndarray], method: str) -> None:
    metric = LFMSE(method)
    metric.update(golden[f"prediction_{method}"], golden[f"target_{method}"], golden["mask"])
    inside, outside = (golden[f"lfmse_{method}_{side}"] for side in ("in", "out"))
    wanted = np.stack([inside, outside, inside + outside], axis=1)
    np.testing.assert_allclose(metric.per_sample(), wanted, rtol=1e-5)
    result = metric.compute()
    assert result["in"] == pytest.approx(inside.mean(), rel=1e-5) and isinstance(result["in"], float)
    assert (result["n"], result["undefined_in"]) == (4, 0)


def test_diffcc_equals_the_published_numbers(golden: dict[str, np.ndarray]) -> None:
    metric = DiffCC()
    metric.update(golden["prediction_canny"], golden["target_canny"], golden["mask"])
    wanted = np.stack([golden[f"diffcc_{name}"] for name in DiffCC.columns], axis=1)
    np.testing.assert_allclose(metric.per_sample(), wanted, rtol=1e-5)


def test_the_layout_and_type_of_the_images_do_not_matter(golden: dict[str, np.ndarray]) -> None:
    names = ("prediction_canny", "target_canny", "mask")
    whole, single = LFMSE(), LFMSE()
    whole.update(*(golden[name] for name in names))
    for i in range(4):
        single.update(*(torch.from_numpy(golden[name][i : i + 1, None]) / 255 for name in names))
    assert np.array_equal(whole.per_sample(), single.per_sample())
    assert np.array_equal(gray_batch("mask", golden["mask"] > 0), golden["mask"])


def test_the_target_itself_has_no_error_and_damage_grows_monotonically(golden: dict[str, np.ndarray]) -> None:
    target, mask = golden["target_canny"], golden["mask"]
    rng = np.random.default_rng(0)
    chance = rng.random(target.shape)
    errors, coincidences = [], []
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        damaged = np.where(chance < share, 255 * (rng.random(target.shape) < 0.5), target).astype(np.uint8)
        low, counts = LFMSE(), DiffCC()
        low.update(damaged, target, mask)
        counts.update(damaged, target, mask)
        errors.append(low.compute()["in"])
        coincidences.append(counts.compute()["hallucination_in"])
    assert errors[0] == 0 and errors == sorted(errors) and errors[1] > 0
    assert coincidences == sorted(coincidences)


def test_white_and_black_rank_below_a_noisy_copy(golden: dict[str, np.ndarray]) -> None:
    target, mask = golden["target_canny"], golden["mask"]
    noisy = np.where(np.random.default_rng(0).random(target.shape) < 0.02, 255 - target, target)
    scores = {}
    for name, prediction in {"noisy": noisy, "white": np.full_like(target, 255), "black": target * 0}.items():
        metric = LFMSE()
        metric.update(prediction, target, mask)
        scores[name] = metric.compute()["in"]
    assert scores["noisy"] < min(scores["white"], scores["black"])


def test_undefined_samples_are_counted_and_spoil_no_mean(golden: dict[str, np.ndarray]) -> None:
    target, mask = golden["target_canny"][:2], golden["mask"][:2].copy()
    mask[1] = 0
    low, counts = LFMSE(), DiffCC()
    low.update(target, target, mask)
    counts.update(target, target, mask)
    result = low.compute()
    assert (result["n"], result["undefined_in"], result["undefined_out"], result["in"]) == (2, 1, 0, 0)
    assert counts.compute()["undefined_coincidence"] == 1 and counts.compute()["coincidence"] == 1
    full = LFMSE()
    full.update(target, target, np.full_like(mask, 255))
    assert full.compute()["undefined_out"] == 2 and math.isnan(full.compute()["out"])
    black = LFMSE("sobel")
    black.update(target * 0, target, golden["mask"][:2])
    assert black.compute()["undefined_in"] == 2


def test_no_square_is_needed() -> None:
    rng = np.random.default_rng(0)
    target, other = (rng.integers(0, 256, (48, 80), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((48, 80), np.uint8)
    mask[:, 40:] = 255
    metric, turned = LFMSE(), LFMSE()
    metric.update(other, target, mask)
    turned.update(other.T.copy(), target.T.copy(), mask.T.copy())
    np.testing.assert_allclose(metric.per_sample(), turned.per_sample(), rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((16, 16), (16, 24), (16, 16)), r"one shape .* target \(1, 16, 24\)"),
        (((3, 3, 16, 16), (16, 16), (16, 16)), "must be"),
        (((4, 4), (4, 4), (4, 4)), "too small"),
    ],
)
def test_bad_shapes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LFMSE().update(*(np.zeros(shape, np.uint8) for shape in arguments))


def test_bad_values_and_no_values() -> None:
    with pytest.raises(ValueError, match="Unknown LFMSE method 'prewitt'"):
        LFMSE("prewitt")
    with pytest.raises(ValueError, match="all values in"):
        gray_batch("mask", np.full((8, 8), 255.0))
    with pytest.raises(ValueError, match="no sample"):
        LFMSE().compute()
    with pytest.raises(ValueError, match="RGB of one size"):
        rgb_batch(np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="all values in"):
        rgb_batch(-torch.ones(2, 3, 8, 8))


def test_lfmse_out_of_the_shipped_code_that_wraps(golden: dict[str, np.ndarray]) -> None:
    """1 - 255 is 2 in uint8, so that its "outside" is everywhere."""
    with np.load(GOLDEN.with_name("training.npz"), allow_pickle=False) as arrays:
        shipped = arrays["lfmse_sobel_out_shipped"]
    metric = LFMSE("sobel", wrapped=True)
    metric.update(golden["prediction_sobel"], golden["target_sobel"], golden["mask"])
    np.testing.assert_allclose(metric.per_sample()[:, 1], shipped, rtol=1e-5)
    np.testing.assert_allclose(metric.per_sample()[:, 0], golden["lfmse_sobel_in"], rtol=1e-5)
    assert np.abs(shipped / golden["lfmse_sobel_out"] - 1).min() > 5e-3
    with pytest.raises(ValueError, match="wrapped applies to the LFMSE method 'sobel' only, not to 'canny'"):
        LFMSE("canny", wrapped=True)
