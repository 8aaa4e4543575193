"""Statistics of features depend on the set only; metrics can be copied, pickled, reset and synchronised."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_helpers import finish, start_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from localctl.distributed import joined
from localctl.metrics.distances import frechet_distance
from localctl.metrics.inside import EdgeScore, SSIMInside
from localctl.metrics.lfmse import LFMSE, DiffCC
from localctl.metrics.statistics import SMALL, FeatureStatistics, Statistics, distances, frechet_name

COUNT, DIM = 41, 12  # odd: no sample may be counted twice


def features() -> tuple[np.ndarray, list[str]]:
    rows = np.random.default_rng(0).normal(3, 1, (COUNT, DIM)).astype(np.float32)
    return rows, [f"picture-{i}" for i in range(COUNT)]


def feature_statistics(part: slice, batch: int = COUNT) -> FeatureStatistics:
    metric = FeatureStatistics(DIM, keep=16)
    rows, keys = features()
    for first in range(*part.indices(COUNT)[:2], batch):
        chosen = slice(first, min(first + batch, part.indices(COUNT)[1]))
        metric.update(rows[chosen], keys[chosen])
    return metric


def sample_metrics(part: slice) -> list[Any]:
    edges = (np.random.default_rng(1).random((2, 5, 32, 32)) < 0.2).astype(np.uint8) * 255
    mask = np.zeros((5, 32, 32), np.uint8)
    mask[:4, :, :20] = 255  # the last is empty
    metrics = [LFMSE(), LFMSE("sobel"), DiffCC(), EdgeScore(), SSIMInside()]
    for metric in metrics:
        for i in range(*part.indices(5)):
            metric.update(edges[0, i], edges[1, i], mask[i])
    return metrics


def results(parts: tuple[slice, slice]) -> dict[str, Any]:
    found = feature_statistics(parts[0]).statistics()
    table = {f"{type(m).__name__}{i}": m.compute() for i, m in enumerate(sample_metrics(parts[1]))}
    mean, covariance = found.gaussian()
    arrays = {"mean": mean, "covariance": covariance, "kept": found.kept}
    return {"n": found.n, **{name: array.tolist() for name, array in arrays.items()}, "samples": table}


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


def compute_part(file: Path) -> None:
    """Compute one process's part of what :func:`results` computes; the first writes all of it to ``file``."""
    with joined() as (rank, count):
        assert count == 2
        found = results(((slice(0, 30), slice(0, 0)), (slice(30, None), slice(0, None)))[rank])
    if rank == 0:
        file.write_text(json.dumps(found))  # JSON keeps NaN, and every digit of floats


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    """One has no samples of some metrics."""
    assert [finish(process) for process in start_ranks(2, compute_part, tmp_path / "two.json")] == [0, 0]
    two = json.loads((tmp_path / "two.json").read_text())
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
