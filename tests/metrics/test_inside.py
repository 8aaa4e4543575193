"""Edges and similarity inside the mask."""

import itertools
import math

import kornia.metrics
import numpy as np
import pytest
import torch

from localctl.metrics.edges import edge_scores
from localctl.metrics.inside import EdgeScore, SSIMInside, ssim_inside

SIZE = (40, 60)


def edge_maps(count: int, seed: int = 0, share: float = 0.05) -> np.ndarray:
    return (np.random.default_rng(seed).random((count, *SIZE)) < share).astype(np.uint8) * 255


def half(count: int) -> np.ndarray:
    mask = np.zeros((count, *SIZE), np.uint8)
    mask[:, :, :30] = 255
    return mask


def test_edge_scores_are_those_of_the_function() -> None:
    prediction, target, mask = edge_maps(3), edge_maps(3, 1), half(3)
    metric = EdgeScore(tolerance_px=1.5)
    metric.update(prediction, target, mask)
    for row, images in zip(metric.per_sample(), zip(prediction, target, mask, strict=True), strict=True):
        scores = edge_scores(*images, tolerance_px=1.5)
        assert tuple(row) == (scores.precision, scores.recall, scores.f1)
    assert metric.compute()["f1"] == pytest.approx(metric.per_sample()[:, 2].mean())


def test_scores_fall_monotonically_with_damage() -> None:
    target = edge_maps(4)
    chance, noise = np.random.default_rng(1).random(target.shape), edge_maps(4, 2)
    rows = []
    for share in (0.0, 0.2, 0.5, 0.9):
        edges, similarity = EdgeScore(), SSIMInside()
        damaged = np.where(chance < share, noise, target)
        edges.update(damaged, target, half(4))
        similarity.update(damaged, target, half(4))
        rows.append((edges.compute()["f1"], similarity.compute()["ssim"]))
    assert rows[0] == (1, pytest.approx(1))
    assert all(a > b for first, second in itertools.pairwise(rows) for a, b in zip(first, second, strict=True))


def test_samples_without_edges_or_mask_are_counted() -> None:
    target, mask = edge_maps(3), half(3)
    target[0], mask[1] = 0, 0
    edges, similarity = EdgeScore(), SSIMInside()
    edges.update(target, target, mask)
    similarity.update(target, target, mask)
    assert (edges.compute()["undefined_f1"], edges.compute()["n"], edges.compute()["f1"]) == (2, 3, 1)
    assert similarity.compute()["undefined_ssim"] == 1 and math.isnan(similarity.per_sample()[1, 0])


def test_similarity_of_the_whole_image_is_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((2, *SIZE))
    usual = kornia.metrics.ssim(*(torch.from_numpy(v)[None, None] for v in (x, y)), window_size=11)[0, 0].numpy()
    mask = np.ones(SIZE, bool)
    inner = np.zeros(SIZE, bool)
    inner[5:-5, 5:-5] = True  # beyond it, windows extend outside the image
    mine = ssim_inside(x, y, mask) * mask.sum()
    border = mine - usual[inner].sum()
    assert abs(border / (~inner).sum() - usual[~inner].mean()) < 0.05
    assert abs(mine / mask.sum() - usual.mean()) < 0.02


def test_nothing_outside_the_mask_changes_the_similarity() -> None:
    x, y, other = np.random.default_rng(0).random((3, *SIZE))
    mask = half(1)[0] > 0
    assert ssim_inside(np.where(mask, x, other), y, mask) == ssim_inside(x, y, mask)
    assert ssim_inside(x, x, mask) == pytest.approx(1)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="tolerance_px >= 0"):
        EdgeScore(tolerance_px=-1)
