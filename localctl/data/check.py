"""Check a dataset before training on it: every row is read exactly as training would read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from localctl.data.bad_rows import BadRow, Problem
from localctl.data.files import FileSource
from localctl.data.geometry import geometry
from localctl.data.sample import Example
from localctl.data.workers import loading
from localctl.drawing import grid, outline
from localctl.images import condition_to_pil, to_pil
from localctl.masks import mask_doubt

PREVIEW_SIDE = 256


@dataclass(frozen=True)
class RowReport:
    """Statistics of a row, all zero if it has a ``problem``.

    image: its (height, width). upscaled: it is smaller than the training size. darkest, mean, brightest, coloured: of
    the condition. mask: (area, share of the image's border inside it). mask_oddities: clauses on the mask by
    :func:`localctl.masks.stretch_mask` and :func:`localctl.masks.mask_doubt`, each "" if nothing is odd.
    """

    problem: Problem | None
    image: tuple[int, int] = (0, 0)
    upscaled: bool = False
    darkest: float = 0.0
    mean: float = 0.0
    brightest: float = 0.0
    coloured: bool = False
    mask: tuple[float, float] | None = None
    mask_oddities: tuple[str, str] = ("", "")
    captions: tuple[str, ...] = ()


def look(source: FileSource, index: int) -> RowReport:
    """Read row ``index`` and compute its statistics."""
    try:
        parts = source.read(index)
    except BadRow as bad:
        return RowReport(Problem(bad.key, bad.reason, str(bad)))
    size = source.data.size
    example = source.example(parts, geometry(parts.size, size), parts.captions[0])
    condition, mask = example.condition, None
    if example.mask is not None:
        values = example.mask[0].numpy()
        border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
        mask = (float(values.mean()), float(border.mean()))
    return RowReport(
        problem=None,
        image=parts.size,
        upscaled=parts.size[0] < size[0] or parts.size[1] < size[1],
        darkest=float(condition.min()),
        mean=float(condition.mean()),
        brightest=float(condition.max()),
        coloured=bool((condition.amax(0) - condition.amin(0)).max() > 0.02),
        mask=mask,
        mask_oddities=(parts.stretched, "" if parts.mask is None else mask_doubt(parts.mask)),
        captions=parts.captions,
    )


class _Rows(Dataset):
    def __init__(self, source: FileSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> RowReport:
        return look(self.source, index)


def look_at_all(source: FileSource, workers: int = 0) -> list[RowReport]:
    """Read every row, in order, with a progress bar on stderr."""
    with loading(_Rows(source), workers, batch_size=None) as rows:
        return list(tqdm(rows, total=len(source), desc="checking", unit="row", mininterval=1))


def preview(examples: Sequence[Example]) -> Image.Image:
    """Render a sheet with a row per example: image, image and condition with the mask's outline, and the mask."""
    rows = []
    for example in examples:
        assert example.mask is not None
        height, width = example.pixels.shape[-2:]
        shrink = max(1.0, max(height, width) / PREVIEW_SIDE)
        size = (round(width / shrink), round(height / shrink))
        image, condition = to_pil(example.pixels), condition_to_pil(example.condition)
        outlined = (outline(one, example.mask) for one in (image, condition))
        cells = (image, *outlined, condition_to_pil(example.mask))
        rows.append([one.resize(size, Image.Resampling.LANCZOS) for one in cells])
    labels = [f"{example.key}: {example.caption}" for example in examples]
    return grid(rows, ("image", "with mask", "condition with mask", "mask, white = controlled"), labels)
