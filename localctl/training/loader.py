"""The batches of a training: where they come from, and what all processes do when one of them gets none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from localctl.data import Batch, MaskedSamples, PlanSampler, SamplePlan, Source, collate
from localctl.data.workers import WorkerError, loading
from localctl.seeding import generator
from localctl.training.state import TrainState


def batches_of(source: Source, state: TrainState) -> AbstractContextManager[Iterator[Batch]]:
    """The micro-batches of this process from the present step to the last."""
    settings, accelerator = state.settings, state.accelerator
    sampler = PlanSampler(
        SamplePlan(len(source), settings.seed),
        settings.train_batch_size,
        state.step,
        settings.steps,
        accumulation=settings.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return loading(
        MaskedSamples(source, settings.mask, settings.seed),
        settings.dataloader_num_workers,
        batch_sampler=sampler,
        collate_fn=collate,
        generator=generator(settings.seed, "loader"),  # or the loader would draw from the global random state
    )


def next_batch(batches: Iterator[Batch], state: TrainState) -> Batch:
    """The next micro-batch. WorkerError on all processes when a worker of one of them was killed."""
    batch: Batch | None = None
    failure: WorkerError | None = None
    try:
        batch = next(batches)
    except WorkerError as error:
        failure = error
    if any(state.agree(failure is not None)):
        raise failure or WorkerError("A data worker of another process was killed")
    assert batch is not None
    return batch
