"""Distances against published numbers, closed forms and other implementations."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from localctl.metrics.distances import clip_mmd, frechet_distance, kernel_distance

GOLDEN = Path(__file__).parents[1] / "goldens" / "frechet.npz"


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def test_frechet_equals_the_published_number() -> None:
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        a, b, wanted = arrays["features_a"], arrays["features_b"], float(arrays["frechet_distance"])
    assert frechet_distance(*gaussian(a), *gaussian(b)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("n", "d", "tolerance"), [(300, 24, 1e-9), (20, 24, 1e-6)])
def test_frechet_equals_the_matrix_root(n: int, d: int, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(0.3, 1.5, (n, d))
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(a), gaussian(b)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(wanted, rel=tolerance)


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    (m1, m2), (s1, s2) = rng.normal(size=(2, 40)), rng.uniform(0, 3, (2, 40))
    wanted = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    assert frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(wanted, rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero_even_where_the_covariance_is_singular() -> None:
    features = np.random.default_rng(0).normal(size=(10, 64))
    assert abs(frechet_distance(*gaussian(features), *gaussian(features))) < 1e-10


def test_frechet_refuses_what_is_not_finite_or_does_not_agree() -> None:
    mean, cov = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.array([np.nan, 0, 0]), cov, mean, cov)
    with pytest.raises(ValueError, match="Means must be"):
        frechet_distance(mean, cov, np.zeros(4), np.eye(4))


def brute_kid(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    within = [sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) for s in (a, b)]
    n, m = len(a), len(b)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_kid_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(0.5, 1, (9, 5))
    assert kernel_distance(a, b).value == pytest.approx(brute_kid(a, b), rel=1e-12)


def test_kid_is_unbiased_and_its_error_is_the_spread_over_sets() -> None:
    rng = np.random.default_rng(0)
    shifted = [kernel_distance(rng.normal(size=(120, 8)), rng.normal(0.4, 1, (80, 8))) for _ in range(60)]
    spread = np.std([k.value for k in shifted], ddof=1)
    assert np.mean([k.error for k in shifted]) == pytest.approx(spread, rel=0.3)
    same = [kernel_distance(rng.normal(size=(120, 8)), rng.normal(size=(80, 8))).value for _ in range(60)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(60) and min(same) < 0


def test_blocks_of_the_kernel_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(41, 6))
    whole = kernel_distance(a, b), clip_mmd(a, b)
    monkeypatch.setattr("localctl.metrics.distances._ROWS", 7)
    assert kernel_distance(a, b).value == pytest.approx(whole[0].value, rel=1e-9)
    assert kernel_distance(a, b).error == pytest.approx(whole[0].error, rel=1e-9)
    assert clip_mmd(a, b) == pytest.approx(whole[1], rel=1e-9)


def test_cmmd_of_two_single_directions() -> None:
    a, b = np.array([[2.0, 0]] * 3), np.array([[0, 5.0]] * 4)  # of unit length they are sqrt(2) apart
    assert clip_mmd(a, b) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)))
    assert clip_mmd(a, a) == pytest.approx(0, abs=1e-9)


def test_every_distance_grows_with_damage() -> None:
    rng = np.random.default_rng(0)
    real, other = rng.normal(size=(2, 300, 16)) + 2
    rows = [
        (frechet_distance(*gaussian(real), *gaussian(x)), kernel_distance(real, x).value, clip_mmd(real, x))
        for x in (other, other + 0.3, other + 1.0 * rng.normal(size=other.shape) - 1)
    ]
    assert all(a < b for first, second in itertools.pairwise(rows) for a, b in zip(first, second, strict=True))


def test_too_few_rows_and_other_dimensions() -> None:
    with pytest.raises(ValueError, match="at least 2 images on each side, not 1 and 5"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="with one d"):
        clip_mmd(np.zeros((4, 3)), np.zeros((5, 2)))
