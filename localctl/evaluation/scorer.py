"""The score for early stopping: the distance of images generated with the adapter from held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localctl.data import MaskedSamples, Source, open_data
from localctl.data.bad_rows import BadRow
from localctl.distributed import process_device
from localctl.evaluation.generated_set import example_of, image_id
from localctl.evaluation.steered import generate_like
from localctl.images import to_pil
from localctl.messages import no_progress_bars
from localctl.metrics.distances import frechet_distance
from localctl.metrics.extractors import EXTRACTORS, Extractor, describe, load_extractor
from localctl.metrics.statistics import FeatureStatistics, Statistics, frechet_name
from localctl.seeding import key_seed
from localctl.training.models import Models
from localctl.training.settings import TrainSettings

METRICS = {frechet_name(extractor): extractor for extractor in EXTRACTORS}


def make_scorer(settings: TrainSettings) -> FrechetScorer | None:
    """Make the scorer of ``early_stopping.metric``; None where no metric or no interval of steps is set.

    ValueError in one sentence when the metric is unknown, or weights, reference or held-out images are missing.
    """
    config = settings.early_stopping
    if config.metric is None:
        return None
    if config.metric not in METRICS:
        raise ValueError(f"Unknown early_stopping.metric {config.metric!r}; choose one of {', '.join(METRICS)}.")
    if not config.every:
        return None
    try:
        held_out = _held_out(settings)
        with no_progress_bars():
            extractor = load_extractor(METRICS[config.metric], config.weights, process_device("auto"))
        reference = None
        if config.reference is not None:
            reference = Statistics.load(Path(config.reference).expanduser())
            _check_reference(reference, extractor, settings)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{reason}; or turn this score off with --early_stopping.every 0.") from error
    return FrechetScorer(settings, held_out, extractor, reference)


def _held_out(settings: TrainSettings) -> Source:
    count = settings.early_stopping.num_images
    source = open_data(settings.data, settings.condition, "val", count, keep=False)
    if len(source) < 2 and not settings.data.is_micro:
        raise ValueError("A distance needs at least 2 held-out images; raise data.validation_share.")
    return source


def _check_reference(reference: Statistics, extractor: Extractor, settings: TrainSettings) -> None:
    """ValueError for statistics of another extractor or size, or of fewer than 2 images."""
    place, provenance = settings.early_stopping.reference, reference.provenance
    own = describe(extractor)
    changed = [name for name in ("extractor", "weights_sha256") if provenance.get(name) != own[name]]
    if list(provenance.get("image_size", settings.data.size)) != list(settings.data.size):
        changed.append("image_size")
    if changed:
        raise ValueError(f"The reference {place} was made with another {', '.join(changed)}; make it again.")
    reference.gaussian()


class FrechetScorer:
    """The Fréchet distance between images generated with the current adapter and held-out images.

    Captions, conditions, masks and noise are always the same, so that scores differ by the adapter alone. The processes
    share the batches, and all return the score of the first process. The weights, the pipeline's scheduler and the
    global random state do not change.
    """

    def __init__(
        self, settings: TrainSettings, held_out: Source, extractor: Extractor, reference: Statistics | None
    ) -> None:
        self.config, self.size = settings.early_stopping, settings.data.size
        self.samples = MaskedSamples(held_out, settings.mask, self.config.seed)
        self.extractor = extractor
        self.reference = reference

    def __call__(self, models: Models, step: int) -> float:
        if self.reference is None:
            self.reference = self._of_held_out()
        made = self._statistics(range(self.config.num_images), lambda indices: self._generate(models, indices))
        distance = [frechet_distance(*self.reference.gaussian(), *made.gaussian())]
        if torch.distributed.is_initialized():  # machines may round differently, but must agree
            torch.distributed.broadcast_object_list(distance, src=0)
        return distance[0]

    def _of_held_out(self) -> Statistics:
        count = min(len(self.samples), self.config.num_images)
        return self._statistics(range(count), self._photos)

    def _statistics(self, indices: range, make: Any) -> Statistics:
        """Collect the statistics of images, batch by batch, over all processes.

        make: indices -> (ids, uint8 (n,H,W,3)); n may be smaller than the number of indices.
        """
        together = torch.distributed.is_initialized()
        rank, count = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
        size = self.config.batch_size
        found: dict[str, Tensor] = {}
        failure: Exception | None = None
        try:
            for first in indices[:: size * count]:
                batch = indices[first + rank * size : first + (rank + 1) * size]
                ids, images = make(batch) if len(batch) else ((), ())
                if len(ids):
                    found |= zip(ids, self.extractor(images), strict=True)
        except Exception as error:  # raised below: the other processes wait for this share first
            failure = error
        shares: list[dict[str, Tensor]] = [found]
        if together:
            gathered: list[Any] = [None for _ in range(count)]
            torch.distributed.all_gather_object(gathered, (found, failure is not None))
            shares = [share for share, _ in gathered]
            if failure is None and any(failed for _, failed in gathered):
                failure = RuntimeError("another process could not generate or measure its share of the images")
        if failure is not None:
            raise failure
        features = {name: row for share in shares for name, row in share.items()}
        if len(features) < 2:
            raise ValueError(f"A distance needs at least 2 images on each side, not {len(features)}.")
        metric = FeatureStatistics(self.extractor.dim, sync_on_compute=False)  # every process has all features
        names = sorted(features)  # sorted, so that the sums are the same in every process
        metric.update(torch.stack([features[name] for name in names]), names)
        return metric.statistics(**describe(self.extractor))

    def _photos(self, indices: Sequence[int]) -> tuple[list[str], np.ndarray]:
        ids, images = [], []
        for index in indices:
            try:
                example = self.samples.source[index]
            except BadRow:
                continue  # the distance uses the readable photos
            ids.append(image_id(index))
            images.append(np.asarray(to_pil(example.pixels)))
        return ids, np.stack(images) if images else np.empty((0, *self.size, 3), np.uint8)

    def _generate(self, models: Models, indices: Sequence[int]) -> tuple[list[str], np.ndarray]:
        examples = [example_of(self.samples, index) for index in indices]
        captions = [example.caption for example in examples]
        seeds = [key_seed(self.config.seed, "score", index) for index in indices]
        sampling, arguments = models.sampling(self.config)
        images = generate_like(
            models.pipe, examples, captions, seeds, models.plain_adapter, sampling=sampling, arguments=arguments
        )
        return [image_id(index) for index in indices], np.stack([np.asarray(image) for image in images])
