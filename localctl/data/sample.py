"""From examples to batches: what every data set delivers, the mask drawn for it, and collation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from localctl.data.plan import SampleRef
from localctl.masks import MaskConfig, sample_mask
from localctl.random import numpy_rng


@dataclass(frozen=True)
class Example:
    """One picture with what belongs to it.

    key: identifies it for ever, whatever else is in the data; random draws are keyed by it.
    pixels (3,H,W) in [-1,1]; condition (C,H,W) in [0,1]; mask (1,H,W) in [0,1], if there is one yet;
    object_masks (n,H,W) in [0,1], if objects are known. epoch: of the visit this is.
    """

    key: str
    pixels: Tensor
    condition: Tensor
    caption: str
    object_masks: Tensor | None = None
    mask: Tensor | None = None
    epoch: int = 0


class Source(Protocol):
    """A data set: examples by index, each a pure function of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class MaskedSamples(Dataset):
    """``source`` with a mask for each visit, keyed by (seed, epoch, key): fresh in every epoch, the same in any worker.
    A mask that the data brings along stays."""

    def __init__(self, source: Source, config: MaskConfig, seed: int) -> None:
        self.source = source
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, ref: SampleRef) -> Example:
        example = self.source[ref.sample]
        mask = example.mask
        if mask is None:
            rng = numpy_rng(self.seed, "mask", ref.epoch, example.key)
            height, width = example.pixels.shape[-2:]
            mask = sample_mask(self.config, (height, width), rng, example.object_masks)
        return replace(example, mask=mask, epoch=ref.epoch, object_masks=None)


@dataclass(frozen=True)
class Batch:
    """Examples, stacked: pixels (B,3,H,W), condition (B,C,H,W), mask (B,1,H,W); keys, epochs, captions: B each."""

    keys: tuple[str, ...]
    epochs: tuple[int, ...]
    captions: tuple[str, ...]
    pixels: Tensor
    condition: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        pixels, condition, mask = (t.to(device, non_blocking=True) for t in (self.pixels, self.condition, self.mask))
        return replace(self, pixels=pixels, condition=condition, mask=mask)


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples of one size, each with its mask."""
    masks = [example.mask for example in examples if example.mask is not None]
    assert len(masks) == len(examples)
    return Batch(
        keys=tuple(example.key for example in examples),
        epochs=tuple(example.epoch for example in examples),
        captions=tuple(example.caption for example in examples),
        pixels=torch.stack([example.pixels for example in examples]),
        condition=torch.stack([example.condition for example in examples]),
        mask=torch.stack(masks),
    )
