import math

import numpy as np
import pytest

from localctl.metrics.edges import edge_scores, match_edges

SIZE = (40, 60)
FULL = np.ones(SIZE, bool)


def line(column: int) -> np.ndarray:
    edges = np.zeros(SIZE, bool)
    edges[:, column] = True
    return edges


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (2, 1.0), (-2, 1.0), (3, 0.0)])
def test_tolerance_is_inclusive(shift: int, expected: float) -> None:
    scores = edge_scores(line(20 + shift), line(20), FULL, tolerance_px=2)
    assert (scores.precision, scores.recall, scores.f1) == (expected, expected, expected)
    assert scores.defined and scores.n_target == scores.n_prediction == 40


def test_distance_is_euclidean() -> None:
    prediction, target = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    target[10, 10] = prediction[12, 12] = True  # 2.83 away
    assert edge_scores(prediction, target, FULL, tolerance_px=2).f1 == 0
    assert edge_scores(prediction, target, FULL, tolerance_px=8**0.5).f1 == 1
    assert edge_scores(prediction, target, FULL, tolerance_px=2.8).f1 == 0


def test_precision_recall_and_f1_of_half_a_match() -> None:
    scores = edge_scores(line(20) | line(40), line(20), FULL)
    assert (scores.precision, scores.recall) == (0.5, 1.0)
    assert scores.f1 == pytest.approx(2 / 3)
    assert (scores.n_prediction, scores.n_target) == (80, 40)


def test_swapping_swaps_precision_and_recall() -> None:
    rng = np.random.default_rng(0)
    a, b, mask = (rng.random(SIZE) < p for p in (0.03, 0.06, 0.5))
    one, other = edge_scores(a, b, mask), edge_scores(b, a, mask)
    assert 0 < one.precision < 1 and one.precision != one.recall
    assert (one.precision, one.recall, one.n_target) == (other.recall, other.precision, other.n_prediction)
    assert one.f1 == pytest.approx(other.f1)


@pytest.mark.parametrize(("tolerance", "density"), [(0, 0.2), (1.5, 0.08), (2, 0.04), (5, 0.02), (8.5, 0.005)])
def test_equals_brute_force(tolerance: float, density: float) -> None:
    rng = np.random.default_rng(3)
    prediction, target, mask = (rng.random((40, 50)) < p for p in (density, density, 0.6))

    def share(edges: np.ndarray, partners: np.ndarray) -> float:
        points, others = np.argwhere(edges & mask), np.argwhere(partners)
        return float((np.linalg.norm(points[:, None] - others[None], axis=-1).min(axis=1) <= tolerance).mean())

    scores = edge_scores(prediction, target, mask, tolerance_px=tolerance)
    assert 0 < scores.precision < 1 and 0 < scores.recall < 1
    assert scores.precision == pytest.approx(share(prediction, target))
    assert scores.recall == pytest.approx(share(target, prediction))


def test_only_counted_pixels_must_lie_inside_the_mask() -> None:
    mask = np.zeros(SIZE, bool)
    mask[:, :30] = True
    inside, outside = line(29), line(30)  # the border runs between them
    scores = edge_scores(outside | line(10), inside | line(10), mask)
    assert (scores.precision, scores.recall, scores.f1) == (1, 1, 1)
    assert (scores.n_prediction, scores.n_target) == (40, 80)
    # Far outside, nothing counts either way.
    noisy = edge_scores(inside | line(50), inside, mask)
    assert (noisy.f1, noisy.n_prediction) == (1, 40)


def test_empty_prediction_is_zero_not_undefined() -> None:
    scores = edge_scores(np.zeros(SIZE, bool), line(20), FULL)
    assert (scores.precision, scores.recall, scores.f1, scores.defined) == (0, 0, 0, True)
    mask = np.zeros(SIZE, bool)
    mask[:, :30] = True
    beside = edge_scores(line(30), line(29), mask)  # edges just outside the mask, none inside
    assert (beside.n_prediction, beside.precision, beside.f1) == (0, 0, 0)


@pytest.mark.parametrize("prediction", [np.zeros(SIZE, bool), line(20)])
def test_too_few_target_edges_are_undefined(prediction: np.ndarray) -> None:
    empty = edge_scores(prediction, np.zeros(SIZE, bool), FULL)
    assert not empty.defined and all(math.isnan(s) for s in (empty.precision, empty.recall, empty.f1))
    assert empty.n_target == 0 and empty.n_prediction == prediction.sum()
    assert not edge_scores(prediction, line(20), FULL, min_target=41).defined
    assert edge_scores(prediction, line(20), FULL, min_target=40).defined
    assert not edge_scores(prediction, line(20), np.zeros(SIZE, bool)).defined


def test_non_bool_arrays_count_nonzero_pixels() -> None:
    assert edge_scores(line(20).astype(np.uint8) * 255, line(20).astype(np.float32), FULL).f1 == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((line(1), line(1)[:, :50], FULL), r"\(40, 60\), \(40, 50\)"),
        ((line(1)[None], line(1)[None], FULL[None]), "one shape"),
        ((line(1), line(1), FULL, -1), "tolerance_px >= 0"),
        ((line(1), line(1), FULL, 2, 0), "min_target >= 1"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edge_scores(*arguments)


def test_edges_are_matched_missed_or_invented() -> None:
    prediction, target = line(20) | line(40), line(21) | line(50)
    mask = FULL.copy()
    mask[:10] = False
    matched, missed, invented = match_edges(prediction, target, mask, tolerance_px=2)
    assert np.array_equal(matched, line(20) & mask)
    assert np.array_equal(missed, line(50) & mask)
    assert np.array_equal(invented, line(40) & mask)
    scores = edge_scores(prediction, target, mask, tolerance_px=2)
    assert scores.precision == matched.sum() / (matched | invented).sum()
    assert scores.recall == 1 - missed.sum() / (target & mask).sum()


def test_without_edges_nothing_is_near() -> None:
    empty = np.zeros_like(FULL)
    matched, missed, invented = match_edges(empty, line(20), FULL)
    assert not matched.any() and not invented.any() and np.array_equal(missed, line(20))
    with pytest.raises(ValueError, match="tolerance_px >= 0"):
        match_edges(empty, empty, FULL, -1)
