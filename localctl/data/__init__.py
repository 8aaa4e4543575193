"""Datasets: what to train on, in which order, and how samples become batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localctl.lazy import lazy_names

if TYPE_CHECKING:
    from localctl.data.bad_rows import BadRow as BadRow
    from localctl.data.bad_rows import Problem as Problem
    from localctl.data.bad_rows import Quarantine as Quarantine
    from localctl.data.bad_rows import TooManyBadRows as TooManyBadRows
    from localctl.data.check import preview as preview
    from localctl.data.config import DataConfig as DataConfig
    from localctl.data.files import FileSource as FileSource
    from localctl.data.files import open_data as open_data
    from localctl.data.files import open_files as open_files
    from localctl.data.micro import MicroScenes as MicroScenes
    from localctl.data.plan import PlanSampler as PlanSampler
    from localctl.data.plan import SamplePlan as SamplePlan
    from localctl.data.plan import SampleRef as SampleRef
    from localctl.data.sample import Batch as Batch
    from localctl.data.sample import Example as Example
    from localctl.data.sample import MaskedSamples as MaskedSamples
    from localctl.data.sample import Source as Source
    from localctl.data.sample import Unusable as Unusable
    from localctl.data.sample import collate as collate

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "bad_rows": ("BadRow", "Problem", "Quarantine", "TooManyBadRows"),
        "check": ("preview",),
        "config": ("DataConfig",),
        "files": ("FileSource", "open_data", "open_files"),
        "micro": ("MicroScenes",),
        "plan": ("PlanSampler", "SamplePlan", "SampleRef"),
        "sample": ("Batch", "Example", "MaskedSamples", "Source", "Unusable", "collate"),
    },
)
