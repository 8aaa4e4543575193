"""Settings of ``localctl cache``."""

from __future__ import annotations

from dataclasses import dataclass

from localctl.records import NotNegative, Positive, record
from localctl.training.settings import TrainSettings


@record()
@dataclass(kw_only=True)
class CacheSettings(TrainSettings):
    """The settings of the training to cache for, and those of caching itself.

    num_variants: encodings per image, if crops, flips or captions are random; epoch e uses variant e mod num_variants.
    cache_conditions: also conditions and the data's masks, so that training opens no image.
    num_workers: processes that encode; null = one per GPU, or without GPUs one per CPU; 0 = this process alone, without
        Ray.
    """

    num_variants: Positive = 1
    cache_conditions: bool = False
    num_workers: NotNegative | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_conditions and self.data.is_micro:
            raise ValueError(
                "The embedded scenes compute their conditions in less than a millisecond; leave cache_conditions out."
            )
