"""Data sets: what to train on, in which order, and how samples become batches."""

from localctl.data.micro import MicroScenes
from localctl.data.plan import PlanSampler, SamplePlan, SampleRef
from localctl.data.sample import Batch, Example, MaskedSamples, Source, collate

__all__ = [
    "Batch",
    "Example",
    "MaskedSamples",
    "MicroScenes",
    "PlanSampler",
    "SamplePlan",
    "SampleRef",
    "Source",
    "collate",
]
