"""The data of a run: its two datasets, its batches, and what is noted on the way: bad rows, empty masks, captions that
are cut."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from localctl.data import Batch, MaskedSamples, PlanSampler, SamplePlan, Source, collate, open_data
from localctl.data.bad_rows import Problem, Quarantine, TooManyBadRows
from localctl.data.files import WITHOUT_VALIDATION, FileSource, part_of
from localctl.data.sample import Example, Unusable
from localctl.data.workers import WorkerError, loading
from localctl.messages import warning
from localctl.seeding import generator
from localctl.sizes import check_side
from localctl.training.settings import TrainSettings
from localctl.training.state import TrainState

logger = logging.getLogger(__name__)
ENOUGH_MASKS = 8  # empty ones in a row are no chance
MOSTLY = 0.5


def open_sources(settings: TrainSettings) -> tuple[Source, Source | None, tuple[int, int]]:
    """Open the training data, the held-out data (None without validation), and find the size (height, width) of the
    first example: their mistakes before anything slow.

    Raises:
        ValueError: the data is not there, of a size that no base takes, or has no usable row (TooManyBadRows).
    """
    train = make_source(settings, "train")
    height, width = first_example(MaskedSamples(train, settings.mask, settings.seed)).pixels.shape[-2:]
    check_side("height", height)
    check_side("width", width)
    return train, held_out_source(settings, train) if settings.validation_steps else None, (height, width)


def make_source(settings: TrainSettings, split: str) -> Source:
    """Open the dataset of a split: ``train`` or ``val``."""
    count = None if split == "train" else 20 * settings.validation.count  # of scenes, some of which are skipped
    return open_data(settings.data, settings.condition, split, count, or_else=WITHOUT_VALIDATION)


def held_out_source(settings: TrainSettings, train: Source) -> Source:
    """Open the dataset of the split ``val``; of the rows that ``train`` has read, where both come from them."""
    if isinstance(train, FileSource) and settings.data.validation_split is None:
        return part_of(train.rows, settings.data, settings.condition, "val", WITHOUT_VALIDATION)
    return make_source(settings, "val")


def first_example(samples: MaskedSamples) -> Example:
    """Load the first sample of a training, as a test before slow work. TooManyBadRows when nothing is usable."""
    found = samples[SamplePlan(len(samples), samples.seed).at(0)]
    if isinstance(found, Unusable):
        raise nothing_usable(found.problems)
    return found


def nothing_usable(problems: tuple[Problem, ...]) -> TooManyBadRows:
    """Why no example was found."""
    listed = "; ".join(f"{problem.key}: {problem.detail}" for problem in dict.fromkeys(problems[:3]))
    return TooManyBadRows(
        f"No usable row was found in {len(problems)} tries ({listed}); run python -m localctl.data check with the same "
        "arguments."
    )


def brings_masks(source: Source) -> bool:
    """Whether examples come with their own masks; without, masks are sampled."""
    return isinstance(source, FileSource) and source.rows.has_masks


def batches_of(source: Source, state: TrainState) -> AbstractContextManager[Iterator[Batch]]:
    """Return the micro-batches of this process from the present step to the last."""
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
        generator=generator(settings.seed, "loader"),  # or the loader would use the global random state
    )


def next_batch(batches: Iterator[Batch], state: TrainState) -> Batch:
    """Return the next micro-batch. WorkerError on all processes when a worker of one of them was killed."""
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


class DataWatch:
    """Looks at each batch before it is used. All processes must call it alike.

    Rows are counted when the training reaches them, not when a worker fetches them ahead: so the count, too, is the
    same with any number of workers and after a resume. tokenizer: counts captions that are cut, beside empty masks;
    None = neither is counted, as of the embedded scenes.
    """

    def __init__(self, accelerator: Accelerator, quarantine: Quarantine, tokenizer: Any) -> None:
        self.accelerator, self.quarantine, self.tokenizer = accelerator, quarantine, tokenizer
        self._seen: set[int] = set()
        self.long_captions = self.masks = self.empty_masks = 0

    def look_at(self, batch: Batch, step: int) -> None:
        """Note the bad rows met for ``batch`` of step ``step``. TooManyBadRows when they are too many, or when no
        usable row was found in their place."""
        problems, usable = self._of_all_processes(batch.problems, len(batch) > 0)
        self.quarantine.add(problems, step)
        if not usable:  # on whichever process: all stop alike
            raise nothing_usable(tuple(problems))
        if self.tokenizer is not None:
            self._count_empty(batch)
            self._count_long(batch)

    def lines(self) -> list[str]:
        """Return what there is to say at the end of a run; nothing if all was well."""
        lines = [self.quarantine.summary()] if self.quarantine.problems else []
        if self.long_captions:
            limit = self.tokenizer.model_max_length
            lines.append(f"{self.long_captions} captions seen were longer than {limit} tokens and cut")
        if self.empty_masks > MOSTLY * self.masks:
            lines.append(
                warning(f"{self.empty_masks} of {self.masks} masks seen were empty: there nothing was learned")
            )
        elif self.empty_masks:
            lines.append(f"{self.empty_masks} of {self.masks} masks seen were empty, so controlled nothing")
        return [f"data        {line}" for line in lines]

    def _count_empty(self, batch: Batch) -> None:
        """Say it once, and early, when all masks so far are empty: the training would run to its end for nothing."""
        empty = int((batch.mask.flatten(1).amax(1) <= 0).sum())
        before = self.masks
        self.masks, self.empty_masks = self.masks + len(batch), self.empty_masks + empty
        if before < ENOUGH_MASKS <= self.masks and self.empty_masks == self.masks:
            logger.warning(
                f"all {self.masks} masks seen so far are empty (0 everywhere): nothing is controlled and nothing can "
                "be learned; white is controlled, look at the masks with python -m localctl.data check."
            )

    def _of_all_processes(self, problems: tuple[Problem, ...], usable: bool) -> tuple[list[Problem], bool]:
        """Return the problems of all, and whether each of them has something to train on."""
        if self.accelerator.num_processes == 1:
            return list(problems), usable
        numbers = torch.tensor([len(problems), int(not usable)], device=self.accelerator.device)
        many, empty = self.accelerator.reduce(numbers).tolist()
        if not many:
            return [], not empty
        return [Problem(*problem) for problem in gather_object(list(problems))], not empty

    def _count_long(self, batch: Batch) -> None:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            visited = hash((key, caption))
            if visited not in self._seen:
                self._seen.add(visited)
                self.long_captions += is_cut(self.tokenizer, caption)


def is_cut(tokenizer: Any, caption: str) -> bool:
    """Whether the text encoder sees only the beginning of ``caption``."""
    limit = tokenizer.model_max_length
    return len(tokenizer(caption, truncation=True, max_length=limit + 1, verbose=False).input_ids) > limit


def shared_quarantine(
    accelerator: Accelerator, folder: Path, rows: int, max_bad_fraction: float, start: int
) -> Quarantine:
    """Return the bad rows of a run that begins at step ``start``; the first process keeps the list, all know it."""
    quarantine = Quarantine(folder if accelerator.is_main_process else None, rows, max_bad_fraction, start)
    if accelerator.num_processes > 1:
        [quarantine.problems] = broadcast_object_list([quarantine.problems])
    return quarantine
