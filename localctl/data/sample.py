"""From examples to batches: the example that every dataset returns, sampling of its mask, and collation."""

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
from localctl.devices import send
from localctl.masks import MaskConfig, sample_mask
from localctl.prompt_embeds import PromptEmbeds
from localctl.seeding import numpy_rng

ATTEMPTS = 16  # if half of the rows are bad, all attempts fail with probability 1/65,536


@dataclass(frozen=True)
class Example:
    """An image with its condition, caption and mask.

    key: permanent name, independent of the rest of the dataset; everything sampled for the example is keyed by it.
    pixels: (3,H,W) in [-1,1]. condition: (C,H,W) in [0,1]. mask: (1,H,W) in [0,1], None before it is sampled.
    object_masks: (n,H,W) in [0,1], if the objects are known. epoch: for which the example was read.
    view: name of the crop that the pixels show, if it can vary. problems: bad rows that this example replaces.
    original: (height, width, top, left), if known: the size of the image's file, and its crop's corner on the scale of
        ``pixels``; SDXL is conditioned on them.
    truth: the objects in the image, if they are known exactly.
    moments: (2c,h,w), mean and standard deviation of the VAE's posterior for ``pixels``; text: one row, the embeddings
        of ``caption``. Both if they were cached; None = encoded while training.
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
    moments: Tensor | None = None
    text: PromptEmbeds | None = None


@dataclass(frozen=True)
class Unusable:
    """The result when all attempts to read an example met bad rows."""

    problems: tuple[Problem, ...]


class Source(Protocol):
    """A dataset: ``source[i]`` is a pure function of i. BadRow for an example that cannot be used.

    A dataset with augmentation also has a method ``visit(ref, seed)``, which returns the example for an epoch as a pure
    function of its arguments; one of several sizes ``another(index, rng)``, which chooses a replacement for a bad row.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class MaskedSamples(Dataset):
    """Examples of ``source``, each with a mask. Masks of the dataset itself are used as they are.

    Other masks are sampled from (seed, epoch, key): a new one in every epoch, the same one in any worker. In a share of
    ``full``, chosen in the same way, the mask is that of the whole image, whatever the example's. A bad row is
    replaced by another one sampled from (seed, epoch, index), in up to ``ATTEMPTS`` attempts; the problems met are
    returned with the example.
    """

    def __init__(self, source: Source, config: MaskConfig, seed: int, full: float = 0.0) -> None:
        self.source = source
        self.config = config
        self.seed = seed
        self.full = full

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, ref: SampleRef) -> Example | Unusable:
        problems: list[Problem] = []
        others = numpy_rng(self.seed, "replacement", ref.epoch, ref.sample)
        index, visit = ref.sample, getattr(self.source, "visit", None)
        another = getattr(self.source, "another", None)
        for _ in range(ATTEMPTS):
            try:
                example = self.source[index] if visit is None else visit(ref._replace(sample=index), self.seed)
                return replace(self._masked(example, ref.epoch), problems=tuple(problems))
            except BadRow as bad:
                problems.append(Problem(bad.key or f"example {index}", bad.reason, str(bad)))
            index = int(others.integers(len(self.source))) if another is None else another(ref.sample, others)
        return Unusable(tuple(problems))

    def _masked(self, example: Example, epoch: int) -> Example:
        mask = example.mask
        if mask is None:
            rng = numpy_rng(self.seed, "mask", epoch, example.key)
            height, width = example.pixels.shape[-2:]
            mask = sample_mask(self.config, (height, width), rng, example.object_masks)
        if self.full and numpy_rng(self.seed, "full mask", epoch, example.key).random() < self.full:
            mask = torch.ones_like(mask)
        return replace(example, mask=mask, epoch=epoch, object_masks=None)


@dataclass(frozen=True)
class Batch:
    """Stacked examples: pixels (B,3,H,W), condition (B,C,H,W), mask (B,1,H,W); B keys, epochs and captions.

    sizes: ``Example.original`` of each; empty = unknown. views: ``Example.view`` of each; key and view together
    identify the pixels. problems: bad rows that were met. A batch that could not be filled has problems and no rows.
    moments (B,2c,h,w), texts (B rows): ``Example.moments`` and ``Example.text`` of all; None unless each has its own.
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
    moments: Tensor | None = None
    texts: PromptEmbeds | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on ``device``, fetched without waiting. Pixels stay where they are: most
        steps do not encode them again."""
        moments = None if self.moments is None else send(self.moments, device)
        texts = None if self.texts is None else self.texts.to(device)
        condition, mask = send(self.condition, device), send(self.mask, device)
        return replace(self, condition=condition, mask=mask, moments=moments, texts=texts)

    def pin_memory(self) -> Batch:
        """Return the batch in memory from which a CUDA device fetches without waiting; ``DataLoader`` calls this."""
        moments = None if self.moments is None else self.moments.pin_memory()
        texts = None if self.texts is None else self.texts.pin_memory()
        pixels = self.pixels.pin_memory() if moments is None else self.pixels
        condition, mask = self.condition.pin_memory(), self.mask.pin_memory()
        return replace(self, pixels=pixels, condition=condition, mask=mask, moments=moments, texts=texts)


def collate(examples: Sequence[Example | Unusable]) -> Batch:
    """Stack examples of equal size, each with its mask; if one is unusable, return a batch without rows."""
    problems = tuple(problem for example in examples for problem in example.problems)
    found = [example for example in examples if isinstance(example, Example)]
    if len(found) < len(examples):
        nothing = torch.empty(0)
        return Batch((), (), (), nothing, nothing, nothing, problems=problems)
    masks = [example.mask for example in found if example.mask is not None]
    assert len(masks) == len(found)
    moments = [example.moments for example in found if example.moments is not None]
    texts = [example.text for example in found if example.text is not None]
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
        moments=torch.stack(moments) if len(moments) == len(found) else None,
        texts=PromptEmbeds.join(texts) if len(texts) == len(found) else None,
    )
