"""Distances must grow with damage, as far as the extractor sees it."""

import itertools

import numpy as np
import pytest

from localctl.metrics.distances import clip_mmd, frechet_distance, kernel_distance
from localctl.metrics.extractors import LITE0_PACKAGE, load_extractor
from localctl.micro.scenes import scene
from research.metric_sanity import climb, main, rungs


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def test_every_distance_sees_noise_by_the_clip_of_the_embedded_base() -> None:
    rows = climb(load_extractor("micro_clip"), 48)
    for name in ("frechet_micro_clip", "kid_micro_clip", "cmmd_micro_clip"):
        values = [rows[rung][name] for rung in ("as they are", "noise added, sigma 100", "nothing but noise")]
        assert values == sorted(values) and values[1] > 2 * values[0], name


def test_real_blurred_noise_by_efficientnet() -> None:
    pytest.importorskip(LITE0_PACKAGE)
    extractor = load_extractor("efficientnet_lite0")
    real, other = (np.stack([scene(i, "basic", "test").image for i in range(s, s + 24)]) for s in (0, 24))
    damaged = rungs(other)
    project = np.random.default_rng(0).normal(size=(extractor.dim, 12))  # fewer dimensions than images
    first = extractor(real).double().numpy()
    rows = []
    for rung in ("as they are", "blurred, sigma 2", "nothing but noise"):
        features = extractor(damaged[rung]).double().numpy()
        far = frechet_distance(*gaussian(first @ project), *gaussian(features @ project))
        rows.append((far, kernel_distance(first, features).value, clip_mmd(first, features)))
    assert all(a < b for one, next_ in itertools.pairwise(rows) for a, b in zip(one, next_, strict=True))


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 7 + 1 and lines[2].startswith("| as they are | ")
    assert main(["--count", "1"]) == 2 and "at least 2 images" in capsys.readouterr().err
