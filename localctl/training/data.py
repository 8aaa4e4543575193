"""The data of a run: its two datasets, its batches, and counts of bad rows, empty masks and truncated captions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from localctl.data import Batch, MaskedSamples, PlanSampler, SamplePlan, Source, collate, open_data
from localctl.data.bad_rows import Problem, Quarantine, TooManyBadRows
from localctl.data.files import WITHOUT_VALIDATION, FileSource, part_of
from localctl.data.image_sizes import image_sizes
from localctl.data.plan import BucketPlan, Plan
from localctl.data.sample import Example, Unusable
from localctl.data.workers import WorkerError, loading
from localctl.messages import warning
from localctl.seeding import generator
from localctl.sizes import check_side
from localctl.training.encoded import plain, with_encodings
from localctl.training.settings import TrainSettings
from localctl.training.state import TrainState

logger = logging.getLogger(__name__)
ENOUGH_MASKS = 8  # if as many in a row are empty, that is no coincidence
MOSTLY = 0.5


def open_sources(
    settings: TrainSettings, accelerator: Accelerator, folder: Path
) -> tuple[Source, Source | None, set[tuple[int, int]]]:
    """Open the training data and the held-out data (None without validation), and return them with the sizes (height,
    width) of their examples. Errors in the data are found here, before slow work.

    folder: where the sizes of images are stored, which aspect-ratio buckets need.

    Raises:
        ValueError: the data does not exist, its size fits no base, or no row is usable (TooManyBadRows).
    """
    train = make_source(settings, "train")
    if isinstance(train, FileSource) and settings.data.buckets:
        train = in_buckets(train, accelerator, folder)
    height, width = first_example(MaskedSamples(train, settings.mask, settings.seed)).pixels.shape[-2:]
    check_side("height", height)
    check_side("width", width)
    sizes = {(height, width)}
    if isinstance(train, FileSource) and train.buckets is not None:
        sizes |= {size for size, _ in train.buckets.used()}
    val = held_out_source(settings, train) if settings.validation_steps else None
    return with_encodings(train, settings) if settings.data.encodings_dir else train, val, sizes


def in_buckets(source: FileSource, accelerator: Accelerator, folder: Path) -> FileSource:
    """Return the examples of ``source`` in aspect-ratio buckets; the processes share the reading of headers."""
    images = image_sizes(
        source.rows,
        source.indices,
        source.data.max_pixels,
        folder,
        accelerator.process_index,
        accelerator.num_processes,
        gather_object,
    )
    return source.in_buckets(images)


def make_source(settings: TrainSettings, split: str) -> Source:
    """Open the dataset of a split, ``train`` or ``val``."""
    count = None if split == "train" else 20 * settings.validation.count  # scenes, some of which are skipped
    return open_data(settings.data, settings.condition, split, count, or_else=WITHOUT_VALIDATION)


def held_out_source(settings: TrainSettings, train: Source) -> Source:
    """Open the dataset of the split ``val``; where both splits share their rows, use those that ``train`` has read."""
    if isinstance(train, FileSource) and settings.data.validation_split is None:
        return part_of(train.rows, settings.data, settings.condition, "val", WITHOUT_VALIDATION)
    return make_source(settings, "val")


def first_example(samples: MaskedSamples) -> Example:
    """Load the first sample of a training, as a check before slow work. TooManyBadRows if no row is usable."""
    found = samples[SamplePlan(len(samples), samples.seed).at(0)]
    if isinstance(found, Unusable):
        raise nothing_usable(found.problems)
    return found


def nothing_usable(problems: tuple[Problem, ...]) -> TooManyBadRows:
    """Return the error for ``problems`` in a row without a usable example."""
    listed = "; ".join(f"{problem.key}: {problem.detail}" for problem in dict.fromkeys(problems[:3]))
    return TooManyBadRows(
        f"No usable row was found in {len(problems)} tries ({listed}); run python -m localctl.data check with the same "
        "arguments."
    )


def has_own_masks(source: Source) -> bool:
    """Return whether the dataset has masks; if not, masks are sampled."""
    source = plain(source)
    return isinstance(source, FileSource) and source.rows.has_masks


def batches_of(source: Source, state: TrainState) -> AbstractContextManager[Iterator[Batch]]:
    """Return the micro-batches of this process from the present step to the last."""
    settings, accelerator = state.settings, state.accelerator
    plan: Plan = SamplePlan(len(source), settings.seed)
    rows = plain(source)
    if isinstance(rows, FileSource) and rows.buckets is not None:
        plan = BucketPlan(rows.buckets, settings.seed, settings.train_batch_size * accelerator.num_processes)
    sampler = PlanSampler(
        plan,
        settings.train_batch_size,
        state.step,
        settings.steps,
        accumulation=settings.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return loading(
        MaskedSamples(source, settings.mask, settings.seed, settings.proportion_full_masks or 0),
        settings.workers,
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
        generator=generator(settings.seed, "loader"),  # without it, the loader uses the global random state
    )


def next_batch(batches: Iterator[Batch], state: TrainState, watch: DataWatch, signal: int = 0) -> tuple[Batch, int]:
    """Return the next micro-batch, checked by ``watch``, and a ``signal`` that any process was sent. All that the
    processes tell each other for it is one message. WorkerError on all of them when a worker of one was killed."""
    batch: Batch | None = None
    failure: WorkerError | None = None
    try:
        batch = next(batches)
    except WorkerError as error:
        failure = error
    problems = batch.problems if batch is not None else ()
    unusable = batch is not None and not len(batch)
    failed, many, empty, signal = state.agree(failure is not None, len(problems), unusable, signal)
    if failed:
        raise failure or WorkerError("A data worker of another process was killed")
    assert batch is not None
    if many and state.accelerator.num_processes > 1:
        problems = tuple(Problem(*problem) for problem in gather_object(list(problems)))
    watch.check(batch, problems, not empty, state.step + 1)
    return batch, signal


class DataWatch:
    """Checks each batch before it is used.

    Rows are counted when the training reaches them, not when a worker fetches them ahead, so that the counts do not
    depend on the number of workers or on a resume.

    Args:
        tokenizer: finds truncated captions. None = count neither these nor empty masks, as for the embedded scenes.
        limit: how many tokens of a caption are read.
    """

    def __init__(self, quarantine: Quarantine, tokenizer: Any, limit: int) -> None:
        self.quarantine, self.tokenizer, self.limit = quarantine, tokenizer, limit
        self._seen: set[int] = set()
        self.long_captions = self.masks = self.empty_masks = 0

    def check(self, batch: Batch, problems: tuple[Problem, ...], usable: bool, step: int) -> None:
        """Record the bad rows that all processes found for ``batch`` of step ``step``. TooManyBadRows if there are too
        many of them, or not ``usable``: one of the processes found no row to replace one."""
        self.quarantine.add(problems, step)
        if not usable:  # on any process: all stop together
            raise nothing_usable(problems)
        if self.tokenizer is not None:
            self._count_empty(batch)
            self._count_long(batch)

    def lines(self) -> list[str]:
        """Return the lines to log at the end of a run; empty if nothing was wrong."""
        lines = [self.quarantine.summary()] if self.quarantine.problems else []
        if self.long_captions:
            lines.append(f"{self.long_captions} captions seen were longer than {self.limit} tokens and truncated")
        if self.empty_masks > MOSTLY * self.masks:
            lines.append(
                warning(f"{self.empty_masks} of {self.masks} masks seen were empty: nothing was learned from them")
            )
        elif self.empty_masks:
            lines.append(f"{self.empty_masks} of {self.masks} masks seen were empty and controlled nothing")
        return [f"data        {line}" for line in lines]

    def _count_empty(self, batch: Batch) -> None:
        """Warn once, and early, if all masks so far are empty: the training would learn nothing."""
        empty = int((batch.mask.flatten(1).amax(1) <= 0).sum())
        before = self.masks
        self.masks, self.empty_masks = self.masks + len(batch), self.empty_masks + empty
        if before < ENOUGH_MASKS <= self.masks and self.empty_masks == self.masks:
            logger.warning(
                f"all {self.masks} masks seen so far are empty (0 everywhere): nothing is controlled and nothing can "
                "be learned; white is controlled, look at the masks with python -m localctl.data check."
            )

    def _count_long(self, batch: Batch) -> None:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            visited = hash((key, caption))
            if visited not in self._seen:
                self._seen.add(visited)
                self.long_captions += is_cut(self.tokenizer, caption, self.limit)


def is_cut(tokenizer: Any, caption: str, limit: int) -> bool:
    """Return whether the text encoder reads only the first ``limit`` tokens of ``caption``."""
    return len(tokenizer(caption, truncation=True, max_length=limit + 1, verbose=False).input_ids) > limit


def shared_quarantine(
    accelerator: Accelerator, folder: Path, rows: int, max_bad_fraction: float, start: int
) -> Quarantine:
    """Return the bad rows of a run that begins at step ``start``; the first process writes their file, all know
    them."""
    quarantine = Quarantine(folder if accelerator.is_main_process else None, rows, max_bad_fraction, start)
    if accelerator.num_processes > 1:
        [quarantine.problems] = broadcast_object_list([quarantine.problems])
    return quarantine
