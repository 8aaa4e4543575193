"""Tiny random pipelines of transformers, of the real classes."""

from __future__ import annotations

from conftest import tiny_tokenizer
from diffusers import DiffusionPipeline

from research.benchmarks.family_pipelines import family_pipeline


def tiny(family: str) -> DiffusionPipeline:
    return family_pipeline(family, tokenizer=tiny_tokenizer())
