"""Data sets: what to train on, in which order, and how samples become batches."""

from localctl.data.bad import BadRow, Problem, Quarantine, TooManyBadRows
from localctl.data.config import DataConfig
from localctl.data.files import FileSource, open_files
from localctl.data.micro import MicroScenes
from localctl.data.plan import PlanSampler, SamplePlan, SampleRef
from localctl.data.sample import Batch, Example, MaskedSamples, Source, Unusable, collate

__all__ = [
    "BadRow",
    "Batch",
    "DataConfig",
    "Example",
    "FileSource",
    "MaskedSamples",
    "MicroScenes",
    "PlanSampler",
    "Problem",
    "Quarantine",
    "SamplePlan",
    "SampleRef",
    "Source",
    "TooManyBadRows",
    "Unusable",
    "collate",
    "open_files",
]
