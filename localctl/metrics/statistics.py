"""Statistics of a set of images for distances: float64 sums, and the features of a limited number of images.

They depend on the set only, not on the order, the batch size or the number of processes.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from localctl.files import write_bytes
from localctl.metrics.distances import clip_mmd, frechet_distance, kernel_distance
from localctl.seeding import key_seed

KEEP = 10_000  # features stored for the kernel distances
SMALL = 2048  # images; Fréchet distances of fewer come with a warning
_SPARE = 1024  # features stored beyond those, at most, until the highest are dropped
_FIELDS = ("counts", "sums", "products", "kept")


@dataclass(frozen=True)
class Statistics:
    """Sums over two random halves of a set, and the features of some of its images.

    counts: images, (2,). sums: of the features x, (2, d). products: sums of x x^T, (2, d, d). kept: features, (k, d).
    provenance: the images and the extractor (at least ``extractor`` and ``weights_sha256``).
    """

    counts: np.ndarray
    sums: np.ndarray
    products: np.ndarray
    kept: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of images."""
        return int(self.counts.sum())

    @property
    def dim(self) -> int:
        """The length of a feature vector."""
        return self.sums.shape[1]

    def gaussian(self, half: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Compute mean (d,) and unbiased covariance (d, d) of the whole set, or of one half (0 or 1). ValueError for
        fewer than 2 images."""
        parts = slice(None) if half is None else slice(half, half + 1)
        n = self.counts[parts].sum()
        if n < 2:
            raise ValueError(f"A distance needs at least 2 images on each side, not {int(n)}.")
        mean = self.sums[parts].sum(0) / n
        return mean, (self.products[parts].sum(0) - n * np.outer(mean, mean)) / (n - 1)

    def split_half(self) -> float:
        """Compute the Fréchet distance between the halves: the scale below which distances of this set mean nothing.

        NaN when a half has fewer than 2 images.
        """
        if self.counts.min() < 2:
            return math.nan
        return frechet_distance(*self.gaussian(0), *self.gaussian(1))

    def save(self, path: Path) -> None:
        """Write ``path`` (.npz) whole or not at all. Features that came as float32 are stored as float32."""
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        arrays = {name: getattr(self, name) for name in _FIELDS}
        short = self.kept.astype(np.float32)
        if np.array_equal(short, self.kept):
            arrays["kept"] = short
        # not compressed: features hardly shrink, and it takes most of the time
        np.savez(buffer, provenance=json.dumps(dict(self.provenance), sort_keys=True), **arrays)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a file that :meth:`save` wrote. ValueError when it does not exist, is damaged or of another format."""
        if not path.is_file():
            raise ValueError(f"There are no statistics at {path}; make them with `python evaluate_fid.py ref`.")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                content = {name: arrays[name] for name in _FIELDS}
                provenance = json.loads(str(arrays["provenance"]))
        except Exception as error:  # zip, numpy and JSON raise various types for damaged files
            raise ValueError(f"{path} holds no statistics or is damaged ({error}); make it again.") from error
        return cls(**content, provenance=provenance)


class FeatureStatistics(Metric):
    """Collect the :class:`Statistics` of feature vectors over batches and processes.

    A hash of its key decides which half an image belongs to, and whether its features are stored. dim: length of a
    feature vector. keep: number of stored features. options: passed to ``Metric``.
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor
    sums: Tensor
    products: Tensor
    ranks: list[Tensor] | Tensor
    features: list[Tensor] | Tensor

    def __init__(self, dim: int, keep: int = KEEP, **options: Any) -> None:
        super().__init__(**options)
        self.dim, self.keep = dim, keep
        self.set_dtype(torch.float64)  # also for the empty states of a process without samples
        shapes = {"counts": (2,), "sums": (2, dim), "products": (2, dim, dim)}
        for name, shape in shapes.items():
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("ranks", "features"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: np.ndarray | Tensor, keys: Sequence[str]) -> None:
        """Add features (B, d) of any float type, and the keys of their B images, all different.

        ValueError for another shape, and for features that are not finite.
        """
        rows = torch.as_tensor(features).detach().to(self.counts.device, torch.float64)
        if rows.shape != (len(keys), self.dim):
            raise ValueError(f"Features must be ({len(keys)}, {self.dim}) for {len(keys)} keys, not {rows.shape}.")
        if not torch.isfinite(rows).all():
            raise ValueError(f"A feature of {keys[0]!r} and the {len(keys) - 1} after it is not finite; use float32.")
        ranks = torch.tensor([key_seed(0, "feature", key) % 2**53 for key in keys], dtype=torch.float64)
        for half in range(2):
            mine = rows[(ranks % 2 == half).to(rows.device)]
            self.counts[half] += len(mine)
            self.sums[half] += mine.sum(0)
            self.products[half].addmm_(mine.T, mine)  # in place: two (d, d) of every batch fragment the memory
        self._store(ranks, rows.cpu())

    def _store(self, ranks: Tensor, rows: Tensor) -> None:
        """Store features (B, d) that may be among the ``keep`` with the lowest ranks."""
        assert isinstance(self.ranks, list) and isinstance(self.features, list)
        stored = sum(len(part) for part in self.ranks)
        if 0 < self.keep <= stored and len(self.ranks[0]) >= self.keep:  # a higher rank than those has no place
            lower = ranks < self.ranks[0].max()
            ranks, rows = ranks[lower], rows[lower]
        if not len(ranks):
            return
        self.ranks.append(ranks)
        self.features.append(rows.flatten())
        if stored + len(ranks) > self.keep + min(self.keep, _SPARE):
            kept_ranks, kept = self._kept()
            self.ranks, self.features = [kept_ranks], [kept.flatten()]

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Return the ``keep`` lowest ranks, sorted, and their features (k, d)."""
        if isinstance(self.ranks, list) and not self.ranks:
            return torch.empty(0, dtype=torch.float64), torch.empty(0, self.dim, dtype=torch.float64)
        ranks, features = dim_zero_cat(self.ranks).cpu(), dim_zero_cat(self.features).cpu().reshape(-1, self.dim)
        order = torch.argsort(ranks, stable=True)[: self.keep]
        return ranks[order], features[order]

    def compute(self) -> dict[str, Tensor]:
        """Return the arrays of :class:`Statistics`, over all processes. ValueError when there is no image."""
        if self.counts.sum() == 0:
            raise ValueError("There are no images to compute statistics of.")
        return {"counts": self.counts, "sums": self.sums, "products": self.products, "kept": self._kept()[1]}

    def statistics(self, **provenance: Any) -> Statistics:
        """Return the statistics of all images so far, with their provenance. ValueError when there is no image."""
        arrays = {name: state.cpu().numpy().copy() for name, state in self.compute().items()}
        arrays["kept"] = arrays["kept"].reshape(-1, self.dim)
        return Statistics(**arrays, provenance=provenance)


@dataclass(frozen=True)
class DistanceReport:
    """Distances by name, with warnings to report. sizes: numbers of images in the reference and in the other set."""

    values: dict[str, float]
    sizes: tuple[int, int]
    warnings: tuple[str, ...]


def distances(reference: Statistics, other: Statistics) -> DistanceReport:
    """Compute all distances between two sets whose features come from the same extractor.

    The names are ``frechet_{extractor}``, or ``fid`` for the extractor "fid"; ``kid_{extractor}`` with its standard
    error ``kid_error_{extractor}``; ``cmmd_{extractor}`` for a CLIP; and ``split_half_{extractor}``, the Fréchet
    distance between two halves of the reference.

    ValueError when a set has fewer than 2 images, or when the extractors or their weights differ.
    """
    names = [s.provenance.get("extractor") for s in (reference, other)]
    hashes = [s.provenance.get("weights_sha256") for s in (reference, other)]
    if names[0] is None or names[0] != names[1] or hashes[0] != hashes[1]:
        raise ValueError(
            f"The features come from {names[0]} ({str(hashes[0])[:8]}) and {names[1]} ({str(hashes[1])[:8]}); extract "
            "both with the same extractor."
        )
    name = str(names[0])
    baseline = reference.split_half()
    kid = kernel_distance(reference.kept, other.kept)
    values = {
        frechet_name(name): frechet_distance(*reference.gaussian(), *other.gaussian()),
        f"split_half_{name}": baseline,
        f"kid_{name}": kid.value,
        f"kid_error_{name}": kid.error,
    }
    if "clip" in name:
        values[f"cmmd_{name}"] = clip_mmd(reference.kept, other.kept)
    sizes = (reference.n, other.n)
    return DistanceReport(values, sizes, _small_warnings(name, sizes, reference.dim, baseline))


def frechet_name(extractor: str) -> str:
    """Name the Fréchet distance of an extractor: ``fid`` only for the published Inception weights."""
    return "fid" if extractor == "fid" else f"frechet_{extractor}"


def _small_warnings(name: str, sizes: tuple[int, int], dim: int, baseline: float) -> tuple[str, ...]:
    small = min(sizes)
    if small >= SMALL and small > dim:
        return ()
    reason = f"fewer than {SMALL}" if small < SMALL else f"not more than its {dim} dimensions"
    return (
        f"{frechet_name(name)} of {sizes[0]} against {sizes[1]} images ({reason}) is biased upwards: two halves "
        f"of the reference, of {sizes[0] // 2} images each, already have the distance {baseline:.4g}.",
    )
