"""Run by torchrun: collect the statistics of a score over all processes; the first process writes them to a file."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from localctl.evaluation.scorer import FrechetScorer
from localctl.training.settings import EarlyStoppingConfig, TrainSettings

COUNT, SIZE = 7, 2  # the last batch is short, and one of two processes has one batch more


def images_of(indices):
    """Make every image from its own seed; image 3 is missing."""
    used = [index for index in indices if index != 3]
    images = [np.random.default_rng(index).integers(0, 255, (4, 4, 3), np.uint8) for index in used]
    return [f"{index:06d}" for index in used], np.stack(images)


class Means:
    """An extractor of the mean colour, three features."""

    name, dim, weights_sha256, preprocessing = "means", 3, "0" * 64, "none"

    def __call__(self, images):
        return torch.from_numpy(images.astype(np.float32).mean((1, 2)))


def statistics():
    """Return the statistics of the seven images over all processes, and the number of batches of this process."""
    extractor, seen = Means(), []
    settings = TrainSettings(early_stopping=EarlyStoppingConfig(batch_size=SIZE))
    scorer = FrechetScorer(settings, SimpleNamespace(), extractor, None)
    made = scorer._statistics(range(COUNT), lambda indices: seen.append(len(indices)) or images_of(indices))
    return made, len(seen)


def main():
    torch.distributed.init_process_group("gloo")
    made, batches = statistics()
    counts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, batches)
    if torch.distributed.get_rank() == 0:
        made.save(Path(sys.argv[1]))
        Path(sys.argv[1]).with_suffix(".txt").write_text(" ".join(map(str, counts)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
