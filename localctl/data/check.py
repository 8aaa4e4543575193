"""Looking at a data set before hours are spent on it: every row is read as the training would read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from localctl.data.bad_rows import SHOWN, BadRow, Problem, count_reasons, too_many, way_out
from localctl.data.config import DataConfig
from localctl.data.files import FileSource
from localctl.data.geometry import geometry
from localctl.data.sample import Example
from localctl.data.workers import loading
from localctl.drawing import grid, outline
from localctl.images import condition_to_pil, to_pil
from localctl.labels import brief
from localctl.masks import mask_doubt
from localctl.messages import warning
from localctl.prompt_syntax import foreign_syntax

EMPTY, FULL = 0.001, 0.999  # shares of the picture
MOSTLY = 0.5  # of the rows must look wrong before it is said to be a mistake
PREVIEW_SIDE = 256


@dataclass(frozen=True)
class RowReport:
    """What was seen in a row. upscaled: the picture is smaller than the size to train at. condition: (darkest, mean,
    brightest, whether coloured). mask: (area, share of the image's border inside it). stretched, doubt: as for masks of
    :func:`localctl.masks.stretch_mask` and :func:`localctl.masks.mask_doubt`."""

    problem: Problem | None
    upscaled: bool = False
    condition: tuple[float, float, float, bool] | None = None
    mask: tuple[float, float] | None = None
    captions: tuple[str, ...] = ()
    stretched: str = ""
    doubt: str = ""


class _Rows(Dataset):
    def __init__(self, source: FileSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> RowReport:
        return look(self.source, index)


def look(source: FileSource, index: int) -> RowReport:
    """Read row ``index`` and take its measure."""
    try:
        parts = source.read(index)
    except BadRow as bad:
        return RowReport(Problem(bad.key, bad.reason, str(bad)))
    size = source.data.size
    example = source.example(parts, geometry(parts.size, size), parts.captions[0])
    condition = example.condition
    coloured = bool((condition.amax(0) - condition.amin(0)).max() > 0.02)
    mask = None
    if example.mask is not None:
        seen = example.mask[0].numpy()
        border = np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]])
        mask = (float(seen.mean()), float(border.mean()))
    return RowReport(
        None,
        parts.size[0] < size[0] or parts.size[1] < size[1],
        (float(condition.min()), float(condition.mean()), float(condition.max()), coloured),
        mask,
        parts.captions,
        parts.stretched,
        "" if parts.mask is None else mask_doubt(parts.mask),
    )


def look_at_all(source: FileSource, workers: int = 0) -> list[RowReport]:
    """Every row, in order, with a progress bar on stderr."""
    with loading(_Rows(source), workers, batch_size=None) as rows:
        return list(tqdm(rows, total=len(source), desc="checking", unit="row", mininterval=1))


def write_report(
    source: FileSource,
    rows: Sequence[RowReport],
    parts: str,
    notes: Sequence[str],
    tokens: Callable[[str], int] | None,
    limit: int,
) -> str:
    """Lines on what was found, warnings last. parts: what of the rows is trained on. notes: clauses on what is not
    used. tokens: length of a caption, of which the text encoder reads ``limit``; None = not known."""
    data = source.data
    good = [row for row in rows if row.problem is None]
    height, width = data.size
    lines = [
        f"rows        {len(rows)}: {parts}",
        *(f"note        {note}" for note in notes),
        *bad_rows(rows),
        f"size        {width}x{height}; {sum(row.upscaled for row in good)} pictures are smaller and scaled up",
    ]
    warnings = _bad_share(len(rows) - len(good), len(rows), data)
    if good:
        warnings += _conditions(source, good, lines)
        warnings += _masks(source, good, lines)
        warnings += _captions(good, lines, tokens, limit, data)
    return "\n".join([*lines, *map(warning, warnings)])


def bad_rows(rows: Sequence[RowReport]) -> list[str]:
    """How many cannot be used and why, the first of them, and what to do about each kind."""
    bad = [row.problem for row in rows if row.problem is not None]
    kinds = dict.fromkeys(problem.reason for problem in bad)
    return [
        f"bad rows    {len(bad)}" + (f" ({count_reasons(bad)})" if bad else ""),
        *(f"            {brief(problem.key)}: {problem.reason}: {problem.detail}" for problem in bad[:SHOWN]),
        *([f"            and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []),
        *(f"            to do: {kind}: {way_out(kind)}" for kind in kinds),
    ]


def _bad_share(bad: int, rows: int, data: DataConfig) -> list[str]:
    if not too_many(bad, rows, data.max_bad_fraction):
        return []
    return [
        f"a training would stop: {bad / rows:.1%} of the rows are bad, over data.max_bad_fraction="
        f"{data.max_bad_fraction:g}; repair them, take them out, or raise it"
    ]


def _conditions(source: FileSource, good: Sequence[RowReport], lines: list[str]) -> list[str]:
    config = source.condition
    low, mean, high, coloured = (
        np.array(values) for values in zip(*(r.condition for r in good if r.condition), strict=True)
    )
    origin = f"from column {source.rows.columns.condition!r}" if source.rows.columns.condition else "from the pictures"
    lines.append(
        f"condition   {config.kind}, {config.channels} channel{'s' * (config.channels > 1)}, {origin}; "
        f"darkest {low.min():.2f}, mean {mean.mean():.2f}, brightest {high.max():.2f}"
    )
    warnings = []
    flat = np.mean(high - low < 0.02)
    if flat > 0.05:
        warnings.append(f"{flat:.0%} of the conditions are of one value and control nothing")
    if source.rows.columns.condition and high.max() < 0.1:
        warnings.append("all conditions are nearly black; are their values 0 ... 1 or 0 ... 10 of 255?")
    if config.kind == "column" and config.channels == 3 and not coloured.any():
        warnings.append("no condition has colours; condition.channels=1 would do")
    return warnings


def _masks(source: FileSource, good: Sequence[RowReport], lines: list[str]) -> list[str]:
    if not source.rows.has_masks:
        lines.append("masks       none in the data; drawn by the settings of mask")
        return []
    area, border = (np.array(values) for values in zip(*(r.mask for r in good if r.mask), strict=True))
    quartiles = ", ".join(f"{share:.0%}" for share in np.percentile(area, (5, 50, 95)))
    lines.append(
        f"masks       from column {source.data.mask_column!r}, white = controlled; area 5th/50th/95th {quartiles}"
    )
    masked = [row for row in good if row.mask]
    empty, full = area < EMPTY, area > FULL
    inverted = (area > 0.5) & (border > 0.9) & ~full
    warnings = []
    for said in ([row.stretched for row in masked], [row.doubt for row in masked]):
        if any(said):
            warnings.append(
                f"{sum(map(bool, said))} of {len(masked)} masks: the first of them {next(filter(None, said))}"
            )
    if empty.any():
        warnings.append(f"{empty.sum()} masks are empty: those examples control nothing")
    if full.any():
        warnings.append(f"{full.sum()} masks are full: those examples are controlled everywhere")
    if inverted.mean() > MOSTLY:
        warnings.append(
            f"{inverted.mean():.0%} of the masks cover the border and most of the picture: are they inverted? White is "
            "what shall be controlled"
        )
    return warnings


def _captions(
    good: Sequence[RowReport], lines: list[str], tokens: Callable[[str], int] | None, limit: int, data: DataConfig
) -> list[str]:
    captions = [caption for row in good for caption in row.captions]
    if data.caption_column is None:
        lines.append("captions    none wanted (data.caption_column=null)")
        return []
    words = np.array([len(caption.split()) for caption in captions])
    line = f"captions    {len(set(captions))} different, {np.median(words):.0f} words (median), {words.max()} at most"
    common, number = Counter(captions).most_common(1)[0]
    warnings = []
    if number > 1 and number > 0.1 * len(captions):
        warnings.append(f"{number} captions are the same: {brief(common, 60)!r}")
    foreign = [caption for caption in captions if foreign_syntax(caption)]
    if foreign:
        marks = ", ".join(foreign_syntax(foreign[0]))
        warnings.append(f"{len(foreign)} captions have marks of other tools ({marks}), which are read as plain letters")
    if tokens is not None:
        lengths = np.array([tokens(caption) for caption in captions])
        line += f"; {lengths.max()} tokens at most"
        if (lengths > limit).any():
            warnings.append(f"{(lengths > limit).sum()} captions are longer than {limit} tokens; the rest is not read")
    lines.append(line)
    return warnings


def preview(examples: Sequence[Example]) -> Image.Image:
    """A sheet of the pictures and their conditions, both with the mask's outline, and the masks."""
    rows = []
    for example in examples:
        assert example.mask is not None
        height, width = example.pixels.shape[-2:]
        shrink = max(1.0, max(height, width) / PREVIEW_SIDE)
        size = (round(width / shrink), round(height / shrink))
        image, condition = to_pil(example.pixels), condition_to_pil(example.condition)
        outlined = (outline(picture, example.mask) for picture in (image, condition))
        shown = (image, *outlined, condition_to_pil(example.mask))
        rows.append([picture.resize(size, Image.Resampling.LANCZOS) for picture in shown])
    labels = [f"{example.key}: {example.caption}" for example in examples]
    return grid(rows, ("image", "with mask", "condition with mask", "mask, white = controlled"), labels)
