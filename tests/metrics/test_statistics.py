"""Statistics of features depend on the set only; metrics can be copied, pickled, reset and synchronised."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_worker import COUNT, DIM, feature_statistics, features, results, sample_metrics
from torch.utils._python_dispatch import TorchDispatchMode

from localctl.metrics.distances import frechet_distance
from localctl.metrics.statistics import SMALL, FeatureStatistics, Statistics, distances, frechet_name


def statistics(rows: np.ndarray, **provenance: Any) -> Statistics:
    metric = FeatureStatistics(rows.shape[1])
    metric.update(rows, [f"{i}" for i in range(len(rows))])
    return metric.statistics(**({"extractor": "tiny_clip", "weights_sha256": "ab"} | provenance))


def close(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[k], second[k]) for k in first)
    return bool(np.allclose(first, second, rtol=1e-9, atol=0, equal_nan=True))


def test_mean_and_covariance_are_numpys() -> None:
    rows, _ = features()
    mean, covariance = feature_statistics(slice(None)).statistics().gaussian()
    np.testing.assert_allclose(mean, rows.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7])
def test_batches_and_order_change_nothing(batch: int) -> None:
    whole, parts = feature_statistics(slice(None)).statistics(), feature_statistics(slice(None), batch).statistics()
    turned = FeatureStatistics(DIM, keep=16)
    rows, keys = features()
    turned.update(rows[::-1].copy(), keys[::-1])
    for other in (parts, turned.statistics()):
        assert np.array_equal(whole.counts, other.counts) and np.array_equal(whole.kept, other.kept)
        assert close(whole.gaussian()[1], other.gaussian()[1])
        far = np.zeros(DIM), np.eye(DIM)
        wanted = frechet_distance(*whole.gaussian(), *far)
        assert frechet_distance(*other.gaussian(), *far) == pytest.approx(wanted, rel=1e-9)


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("metric_worker.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    target = tmp_path / "two.json"
    subprocess.run([*command, str(worker), str(target)], check=True, env=environment, timeout=300)
    two = json.loads(target.read_text())
    assert two["n"] == COUNT
    assert close(two, results((slice(None), slice(None))))


def test_metrics_go_on_after_compute_and_reset_and_travel() -> None:
    for metric in sample_metrics(slice(0, 2)):
        first = metric.compute()
        assert close(metric.compute(), first)
        copy = pickle.loads(pickle.dumps(metric))
        edges = np.eye(32, dtype=np.uint8) * 255
        for one in (metric, copy):
            one.update(edges, edges, np.full_like(edges, 255))
        assert metric.compute()["n"] == 3 and close(copy.compute(), metric.compute())
        metric.reset()
        metric.update(edges, edges, np.full_like(edges, 255))
        assert metric.compute()["n"] == 1
    whole = feature_statistics(slice(None))
    part = pickle.loads(pickle.dumps(feature_statistics(slice(0, 20))))
    part.compute()
    part.update(features()[0][20:], features()[1][20:])
    assert close(part.statistics().gaussian()[1], whole.statistics().gaussian()[1])
    part.reset()
    with pytest.raises(ValueError, match="no image"):
        part.compute()


def test_no_more_features_are_kept_than_asked_for() -> None:
    metric = feature_statistics(slice(None), batch=4)
    assert metric.statistics().kept.shape == (16, DIM)
    assert sum(len(part) for part in metric.ranks) <= 32 + 4


def test_features_beyond_the_kept_ones_are_dropped_in_any_batches() -> None:
    whole = feature_statistics(slice(None)).statistics().kept
    rows, keys = features()
    for sizes in ([16, 25], [16, *[1] * 25], [20, 1, 20], [33, 8]):
        metric, first = FeatureStatistics(DIM, keep=16), 0
        for size in sizes:
            metric.update(rows[first : first + size], keys[first : first + size])
            first += size
        assert first == COUNT and np.array_equal(metric.statistics().kept, whole)


def test_a_batch_makes_no_second_matrix_of_products() -> None:
    dim, largest = 64, 0

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != own:
                largest = max(largest, out.numel())
            return out

    metric = FeatureStatistics(dim)
    own = metric.products.untyped_storage().data_ptr()
    with Made():
        metric.update(torch.ones(8, dim), [str(i) for i in range(8)])
    assert 8 * dim <= largest < dim * dim and float(metric.products.sum()) == 8 * dim**2


def test_statistics_are_saved_whole_and_read_back(tmp_path: Path) -> None:
    made = statistics(np.random.default_rng(0).normal(size=(9, 4)), data="photos", path="ü")
    made.save(tmp_path / "in" / "ref.npz")
    read = Statistics.load(tmp_path / "in" / "ref.npz")
    assert read.provenance == made.provenance and np.array_equal(read.products, made.products)
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["ref.npz"]
    arrays = {name: getattr(made, name) for name in ("counts", "sums", "products", "kept")}
    np.savez_compressed(tmp_path / "earlier.npz", provenance=json.dumps(dict(made.provenance)), **arrays)
    assert np.array_equal(Statistics.load(tmp_path / "earlier.npz").kept, read.kept) and read.kept.dtype == np.float64
    statistics(made.kept.astype(np.float32)).save(tmp_path / "short.npz")
    short = Statistics.load(tmp_path / "short.npz").kept
    assert short.dtype == np.float32 and np.array_equal(np.sort(short, 0), np.sort(made.kept.astype(np.float32), 0))
    (tmp_path / "bad.npz").write_bytes((tmp_path / "in" / "ref.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="bad.npz holds no statistics or is damaged"):
        Statistics.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="There are no statistics"):
        Statistics.load(tmp_path / "none.npz")


def test_small_sets_are_warned_about_with_their_own_halves() -> None:
    rng = np.random.default_rng(0)
    a, b = statistics(rng.normal(size=(60, 6))), statistics(rng.normal(size=(50, 6)))
    report = distances(a, b)
    assert report.sizes == (60, 50)
    baseline = frechet_distance(*a.gaussian(0), *a.gaussian(1))
    assert report.values["split_half_tiny_clip"] == baseline and f"{baseline:.4g}" in report.warnings[0]
    assert set(report.values) == {f"{n}_tiny_clip" for n in ("frechet", "split_half", "kid", "kid_error", "cmmd")}
    many = statistics(rng.normal(size=(SMALL, 6)))
    assert distances(many, many).warnings == ()


def test_few_images_strange_features_and_other_extractors_are_errors() -> None:
    rows = np.random.default_rng(0).normal(size=(8, 3))
    with pytest.raises(ValueError, match="at least 2 images on each side, not"):
        distances(statistics(rows), statistics(rows[:1]))
    for change in ({"weights_sha256": "cd"}, {"extractor": "other"}):
        with pytest.raises(ValueError, match="extract both with the same"):
            distances(statistics(rows), statistics(rows, **change))
    with pytest.raises(ValueError, match="not finite"):
        statistics(np.full((4, 3), np.inf))
    with pytest.raises(ValueError, match="for 2 keys"):
        FeatureStatistics(3).update(rows, ["a", "b"])
    assert math.isnan(statistics(rows[:2]).split_half())


def test_no_global_generator_is_moved() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    rows = np.random.default_rng(0).normal(size=(30, 3))
    distances(statistics(rows), statistics(rows + 1))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_only_inception_measures_fid() -> None:
    assert frechet_name("fid") == "fid" and frechet_name("efficientnet_lite0") == "frechet_efficientnet_lite0"
