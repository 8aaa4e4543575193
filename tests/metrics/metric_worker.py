"""Split the samples of metrics over two processes, one without samples of some: run by torchrun, or imported.

torchrun --standalone --nproc_per_node 2 tests/metrics/metric_worker.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from localctl.metrics.inside import EdgeScore, SSIMInside
from localctl.metrics.lfmse import LFMSE, DiffCC
from localctl.metrics.statistics import FeatureStatistics

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


def main(file: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    assert distributed.get_world_size() == 2, "not two processes"
    parts = ((slice(0, 30), slice(0, 0)), (slice(30, None), slice(0, None)))[rank]
    found = results(parts)
    if rank == 0:
        file.write_text(json.dumps(found))  # JSON keeps NaN, and every digit of floats
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
