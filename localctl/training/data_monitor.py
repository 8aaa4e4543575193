"""What a run says about its data: what it is, which rows were bad, which captions are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from localctl.data.bad_rows import Problem, Quarantine, TooManyBadRows
from localctl.data.config import DataConfig
from localctl.data.files import FileSource
from localctl.data.plan import SamplePlan
from localctl.data.sample import Batch, Example, MaskedSamples, Source, Unusable
from localctl.messages import warning
from localctl.pipelines import own_side
from localctl.training.models import Models
from localctl.training.settings import TrainSettings

ENOUGH_MASKS = 8  # empty ones in a row are no chance
MOSTLY = 0.5


class DataWatch:
    """Looks at each batch before it is used. All processes must call it alike.

    Rows are counted when the training reaches them, not when a worker fetches them ahead: so the count, too, is the
    same with any number of workers and after a resume.
    """

    def __init__(self, accelerator: Accelerator, models: Models, quarantine: Quarantine, data: DataConfig) -> None:
        self.accelerator, self.models = accelerator, models
        self.quarantine = quarantine
        self._read_captions = not data.is_micro
        self._seen: set[int] = set()
        self.long_captions = 0
        self.masks = self.empty_masks = 0
        self.say: Callable[[str], None] = tqdm.write

    def look_at(self, batch: Batch, step: int) -> None:
        """Note the bad rows met for ``batch`` of step ``step``. TooManyBadRows when they are too many, or when no
        usable row was found in their place."""
        problems, usable = self._of_all_processes(batch.problems, len(batch) > 0)
        self.quarantine.add(problems, step)
        if not usable:  # on whichever process: all stop alike
            raise nothing_usable(tuple(problems))
        if self._read_captions:
            self._count_empty(batch)
            self._count_long(batch)

    def lines(self) -> list[str]:
        """What there is to say at the end of a run; nothing if all was well."""
        lines = [self.quarantine.summary()] if self.quarantine.problems else []
        if self.long_captions:
            limit = self.models.pipe.tokenizer.model_max_length
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
            said = (
                f"all {self.masks} masks seen so far are empty (0 everywhere): nothing is controlled and nothing can "
                "be learned; white is controlled, look at the masks with python -m localctl.data check."
            )
            self.say(warning(said))

    def _of_all_processes(self, problems: tuple[Problem, ...], usable: bool) -> tuple[list[Problem], bool]:
        """The problems of all, and whether each of them has something to train on."""
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
                self.long_captions += is_cut(self.models.pipe.tokenizer, caption)


def is_cut(tokenizer: object, caption: str) -> bool:
    """Whether the text encoder sees only the beginning of ``caption``."""
    limit = tokenizer.model_max_length  # type: ignore[attr-defined]
    return len(tokenizer(caption, truncation=True, max_length=limit + 1, verbose=False).input_ids) > limit  # type: ignore[operator]


def first_example(samples: MaskedSamples) -> Example:
    """The first one of the training, as a test before slow work. TooManyBadRows when nothing usable is found."""
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
    """Whether examples come with their own masks; without, masks are drawn."""
    return isinstance(source, FileSource) and source.rows.has_masks


def announced(data: DataConfig, source: Source) -> str:
    """What is trained on, in a few words."""
    if data.is_micro:
        return f"{len(source)} micro {data.profile} examples"
    place = f"{data.name} {data.path}" if data.path else data.name
    masks = f", masks from {data.mask_column!r}" if brings_masks(source) else ""
    height, width = data.size
    return f"{len(source)} examples of {place} at {width}x{height}{masks}"


def remarks(settings: TrainSettings, source: Source | None) -> list[str]:
    """What of the data is not used as one might think, a clause each."""
    if not isinstance(source, FileSource):
        return []
    notes = [source.note, size_note(settings.data, settings.base.name)]
    return [*source.rows.remarks(), *filter(None, notes)]


def size_note(data: DataConfig, base: str) -> str:
    """A clause where the size to train at is nobody's choice and not the base's own; else empty."""
    own = own_side(base)
    if data.is_micro or data.resolution is not None or own is None or data.size == (own, own):
        return ""
    side = data.size[0]
    return f"{side}x{side} is only the default, and the base {base} makes images of {own}x{own}: --resolution {own}"


def new_watch(
    accelerator: Accelerator, models: Models, data: DataConfig, folder: Path, rows: int, start: int
) -> DataWatch:
    """The watch of a run that begins at step ``start``; the first process keeps the list, all know it."""
    place = folder if accelerator.is_main_process else None
    quarantine = Quarantine(place, rows, data.max_bad_fraction, start)
    if accelerator.num_processes > 1:
        [quarantine.problems] = broadcast_object_list([quarantine.problems])
    return DataWatch(accelerator, models, quarantine, data)
