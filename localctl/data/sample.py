"""From examples to batches: what every data set delivers, the mask sampled for it, and collation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from localctl.boxes import Truth
from localctl.data.bad_rows import BadRow, Problem
from localctl.data.plan import SampleRef
from localctl.masks import MaskConfig, sample_mask
from localctl.seeding import numpy_rng

ATTEMPTS = 16  # with half of the rows bad, one visit in 65,000 finds none


@dataclass(frozen=True)
class Example:
    """One image with what belongs to it.

    key: identifies it for ever, whatever else is in the data; what is sampled for it is keyed by it.
    pixels (3,H,W) in [-1,1]; condition (C,H,W) in [0,1]; mask (1,H,W) in [0,1], if there is one yet;
    object_masks (n,H,W) in [0,1], if objects are known. epoch: of the visit this is. view: names what part of the
    image the pixels show, where that can vary. problems: bad rows that this one stands in for.
    original: height and width of the image as it was found, and where its crop begins (top, left, on the scale of
        ``pixels``), if known; SDXL is told.
    truth: what the image shows, where that is known exactly.
    """

    key: str
    pixels: Tensor
    condition: Tensor
    caption: str
    object_masks: Tensor | None = None
    mask: Tensor | None = None
    epoch: int = 0
    view: str = ""
    problems: tuple[Problem, ...] = ()
    original: tuple[int, int, int, int] | None = None
    truth: Truth | None = None


@dataclass(frozen=True)
class Unusable:
    """What a visit ends with when row after row was bad."""

    problems: tuple[Problem, ...]


class Source(Protocol):
    """A data set: examples by index, each a pure function of it. BadRow for one that cannot be used.

    One whose examples look different from epoch to epoch has a method ``visit(ref, seed)``, too: an example as a pure
    function of these.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class MaskedSamples(Dataset):
    """``source`` with a mask for each visit, keyed by (seed, epoch, key): fresh in every epoch, the same in any worker.
    A mask that the data brings along stays.

    For a bad row another one is sampled by (seed, epoch, index), again and again up to ``ATTEMPTS`` times; what was met
    on the way travels with the example, so that whoever uses it knows.
    """

    def __init__(self, source: Source, config: MaskConfig, seed: int) -> None:
        self.source = source
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, ref: SampleRef) -> Example | Unusable:
        problems: list[Problem] = []
        others = numpy_rng(self.seed, "replacement", ref.epoch, ref.sample)
        index, visit = ref.sample, getattr(self.source, "visit", None)
        for _ in range(ATTEMPTS):
            try:
                example = self.source[index] if visit is None else visit(SampleRef(index, ref.epoch), self.seed)
                return replace(self._masked(example, ref.epoch), problems=tuple(problems))
            except BadRow as bad:
                problems.append(Problem(bad.key or f"example {index}", bad.reason, str(bad)))
            index = int(others.integers(len(self.source)))
        return Unusable(tuple(problems))

    def _masked(self, example: Example, epoch: int) -> Example:
        mask = example.mask
        if mask is None:
            rng = numpy_rng(self.seed, "mask", epoch, example.key)
            height, width = example.pixels.shape[-2:]
            mask = sample_mask(self.config, (height, width), rng, example.object_masks)
        return replace(example, mask=mask, epoch=epoch, object_masks=None)


@dataclass(frozen=True)
class Batch:
    """Examples, stacked: pixels (B,3,H,W), condition (B,C,H,W), mask (B,1,H,W); keys, epochs, captions: B each.

    sizes: ``Example.original`` of each; empty = none is known. views: B, of the examples; key and view together name
    the pixels. problems: bad rows met on the way. A batch that could not be filled has no row at all, only problems.
    """

    keys: tuple[str, ...]
    epochs: tuple[int, ...]
    captions: tuple[str, ...]
    pixels: Tensor
    condition: Tensor
    mask: Tensor
    views: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    sizes: tuple[tuple[int, int, int, int] | None, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on ``device``."""
        pixels, condition, mask = (t.to(device, non_blocking=True) for t in (self.pixels, self.condition, self.mask))
        return replace(self, pixels=pixels, condition=condition, mask=mask)


def collate(examples: Sequence[Example | Unusable]) -> Batch:
    """Stack examples of one size, each with its mask."""
    problems = tuple(problem for example in examples for problem in example.problems)
    found = [example for example in examples if isinstance(example, Example)]
    if len(found) < len(examples):
        nothing = torch.empty(0)
        return Batch((), (), (), nothing, nothing, nothing, problems=problems)
    masks = [example.mask for example in found if example.mask is not None]
    assert len(masks) == len(found)
    return Batch(
        keys=tuple(example.key for example in found),
        epochs=tuple(example.epoch for example in found),
        captions=tuple(example.caption for example in found),
        pixels=torch.stack([example.pixels for example in found]),
        condition=torch.stack([example.condition for example in found]),
        mask=torch.stack(masks),
        views=tuple(example.view for example in found),
        problems=problems,
        sizes=tuple(example.original for example in found),
    )
