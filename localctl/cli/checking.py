"""``localctl check-data``: read every row as training would, and report statistics and likely mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from localctl.adapter_files import find_adapter
from localctl.bases import resolve_base
from localctl.cli.training_flags import CheckSettings
from localctl.data.bad_rows import SHOWN, count_reasons, too_many, way_out
from localctl.data.check import RowReport, look_at_all, preview
from localctl.data.files import WITHOUT_VALIDATION, FileSource, open_rows, part_of
from localctl.data.held_out import held_out
from localctl.data.plan import SampleRef
from localctl.data.rows import Rows
from localctl.data.sample import Example, MaskedSamples
from localctl.labels import shorten
from localctl.messages import warning
from localctl.metrics.edges import MIN_EDGES
from localctl.prompt_syntax import foreign_syntax
from localctl.seeding import numpy_rng
from localctl.training.summary import remarks
from localctl.training.validation import choose_cases

_NAMED = 3  # held-out examples are listed by name if there are no more than this
_EMPTY, _FULL = 0.001, 0.999  # areas of a mask, as shares of the image
_MOSTLY = 0.5  # masks are reported as inverted if more than this share looks so


def check(settings: CheckSettings) -> str:
    """Check the data, and return the report.

    Raises:
        ValueError: the data cannot be opened, the adapter takes another condition, or the preview is no image file.
    """
    data = settings.data
    if data.is_micro:
        raise ValueError("The embedded scenes need no check; give your own data: data=imagefolder data.path=FOLDER.")
    fit = _adapter_fit(settings)
    target = Path(settings.preview).expanduser()
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"The preview {target} is not the name of an image file; let it end in .png.")
    rows = open_rows(data, settings.condition, data.split)
    held = open_rows(data, settings.condition, data.validation_split) if data.validation_split else None
    source = FileSource(rows, range(len(rows)), data, settings.condition)
    report = _Report(settings, source, look_at_all(source, settings.workers))
    failures = report.parts(rows, held or rows)
    report.add_rows()
    report.lines.append(fit)
    if held is not None:
        every = FileSource(held, range(len(held)), data, settings.condition)
        first, *more = _bad_rows(look_at_all(every, settings.workers))
        report.lines += [f"validation  {first}, in the split {data.validation_split!r}", *more]
    examples = _examples(MaskedSamples(source, settings.mask, settings.seed), settings)
    report.lines += map(warning, failures)
    if examples:
        target.parent.mkdir(parents=True, exist_ok=True)
        preview(examples).save(target)
        report.lines.append(f"preview     {target}")
    return "\n".join(report.lines)


class _Report:
    """The lines of the report on the rows to train on; likely mistakes are collected in ``warnings``."""

    def __init__(self, settings: CheckSettings, source: FileSource, rows: Sequence[RowReport]) -> None:
        self.settings, self.source, self.rows = settings, source, rows
        self.good = [row for row in rows if row.problem is None]
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def parts(self, rows: Rows, held: Rows) -> list[str]:
        """Add how many rows are trained on and held out, and remarks. Return the errors that would stop training."""
        settings, data = self.settings, self.settings.data
        notes, failures = [], []
        parts: dict[str, FileSource] = {}
        names = ("train", "val") if settings.validation_steps else ("train",)
        for name in names:
            try:
                of_name = held if name == "val" else rows
                parts[name] = part_of(of_name, data, settings.condition, name, WITHOUT_VALIDATION)
            except ValueError as error:
                failures.append(f"training would stop: {error}")
        if "val" in parts:
            try:
                if not choose_cases(parts["val"], settings)[0].scored:
                    notes.append(f"no held-out mask contains {MIN_EDGES} edge pixels, so validation will have no score")
            except ValueError as error:
                failures.append(f"training would stop: {error}")
        count = {name: len(part) for name, part in parts.items()}
        if len(names) == 1:
            count["val"] = 0 if data.validation_split else sum(held_out(rows.keys, data.validation_share)[0])
        if "val" in parts and 0 < count["val"] <= _NAMED and not (parts["val"].note or data.validation_split):
            keys = [shorten(parts["val"].rows.keys[index]) for index in parts["val"].indices]
            notes.append(f"held out for validation: {', '.join(keys)}")
        if data.buckets and "train" in parts:
            known = np.array([row.image for row in self.rows], np.int32).reshape(-1, 2)
            try:
                parts["train"] = parts["train"].in_buckets(known[parts["train"].indices])
            except ValueError as error:
                failures.append(f"training would stop: {error}")
        notes = [*remarks(settings, next(iter(parts.values()), None)), *notes]
        numbers = f"{count.get('train', 0)} to train on, {count.get('val', 0)} for validation"
        self.lines += [f"rows        {len(self.rows)}: {numbers}", *(f"note        {note}" for note in notes)]
        return failures

    def add_rows(self) -> None:
        """Add the statistics of the rows, with the warnings at the end."""
        data, bad = self.settings.data, len(self.rows) - len(self.good)
        height, width = data.size
        small = sum(row.upscaled for row in self.good)
        size = f"{width}x{height}; {small} images are smaller and scaled up"
        if data.buckets:
            size = f"{len(data.buckets)} buckets; {width}x{height} for validation"
        self.lines += [*_bad_rows(self.rows), f"size        {size}"]
        if too_many(bad, len(self.rows), data.max_bad_fraction):
            self.warnings.append(
                f"training would stop: {bad / len(self.rows):.1%} of the rows are bad, more than data.max_bad_fraction="
                f"{data.max_bad_fraction:g}; repair them, remove them, or raise it"
            )
        not_counted = ""
        if self.good:
            self._conditions()
            self._masks()
            not_counted = self._captions()
        self.lines += [*map(warning, self.warnings), *filter(None, [not_counted])]

    def _conditions(self) -> None:
        config, column = self.settings.condition, self.source.rows.columns.get("condition")
        low, mean, high = np.array([(row.darkest, row.mean, row.brightest) for row in self.good]).T
        self.lines.append(
            f"condition   {config.kind}, {config.channels} channel{'s' * (config.channels > 1)}, "
            f"{f'from column {column!r}' if column else 'from the images'}; "
            f"darkest {low.min():.2f}, mean {mean.mean():.2f}, brightest {high.max():.2f}"
        )
        flat = np.mean(high - low < 0.02)
        if flat > 0.05:
            self.warnings.append(f"{flat:.0%} of the conditions are images of one value and control nothing")
        if column and high.max() < 0.1:
            self.warnings.append("all conditions are nearly black; check whether their white is 1 and not 255")
        if config.kind == "column" and config.channels == 3 and not any(row.coloured for row in self.good):
            self.warnings.append("no condition has colours; condition.channels=1 is enough")

    def _masks(self) -> None:
        if not self.source.rows.has_masks:
            self.lines.append("masks       none in the data; they are sampled by the settings of mask")
            return
        area, border = np.array([row.mask for row in self.good]).T
        quartiles = ", ".join(f"{share:.0%}" for share in np.percentile(area, (5, 50, 95)))
        column = self.source.rows.columns["mask"]
        self.lines.append(f"masks       from column {column!r}, white = controlled; area 5th/50th/95th {quartiles}")
        for oddities in zip(*(row.mask_oddities for row in self.good), strict=True):
            if any(oddities):
                odd, first = sum(map(bool, oddities)), next(filter(None, oddities))
                self.warnings.append(f"{odd} of {len(oddities)} masks: the first of them {first}")
        empty, full = area < _EMPTY, area > _FULL
        inverted = np.mean((area > 0.5) & (border > 0.9) & ~full)
        if empty.any():
            self.warnings.append(f"{empty.sum()} masks are empty: those examples control nothing")
        if full.any():
            self.warnings.append(f"{full.sum()} masks are full: those examples are controlled everywhere")
        if inverted > _MOSTLY:
            self.warnings.append(
                f"{inverted:.0%} of the masks cover the border and most of the image; if they are inverted, make the "
                "controlled part white"
            )

    def _captions(self) -> str:
        """Add statistics of the captions. Return a line if their tokens cannot be counted, else ""."""
        captions = [caption for row in self.good for caption in row.captions]
        tokenizer, not_counted = _tokenizer(self.settings)
        if self.settings.data.caption_column is None:
            self.lines.append("captions    not used (data.caption_column=null)")
            return not_counted
        words = np.array([len(caption.split()) for caption in captions])
        line = (
            f"captions    {len(set(captions))} different, {np.median(words):.0f} words (median), {words.max()} at most"
        )
        common, number = Counter(captions).most_common(1)[0]
        if number > 1 and number > 0.1 * len(captions):
            self.warnings.append(f"{number} captions are the same: {shorten(common, 60)!r}")
        if foreign := [found for caption in captions if (found := foreign_syntax(caption))]:
            syntax = f"syntax of other tools ({', '.join(foreign[0])}), which is read as text"
            self.warnings.append(f"{len(foreign)} captions have {syntax}")
        if tokenizer is not None:
            limit = tokenizer.model_max_length
            lengths = np.array([len(tokenizer(caption, verbose=False).input_ids) for caption in captions])
            line += f"; {lengths.max()} tokens at most"
            if (lengths > limit).any():
                longer = f"{(lengths > limit).sum()} captions are longer than {limit} tokens"
                self.warnings.append(f"{longer}; the base ignores the rest")
        self.lines.append(line)
        return not_counted


def _bad_rows(rows: Sequence[RowReport]) -> list[str]:
    """Return lines on bad rows: their number and reasons, the first of them, and what to do about each reason."""
    bad = [row.problem for row in rows if row.problem is not None]
    kinds = dict.fromkeys(problem.reason for problem in bad)
    return [
        f"bad rows    {len(bad)}" + (f" ({count_reasons(bad)})" if bad else ""),
        *(f"            {shorten(problem.key)}: {problem.reason}: {problem.detail}" for problem in bad[:SHOWN]),
        *([f"            and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []),
        *(f"            to do: {kind}: {way_out(kind)}" for kind in kinds),
    ]


def _examples(samples: MaskedSamples, settings: CheckSettings) -> list[Example]:
    """Sample usable examples of the whole dataset, as they are in the first epoch."""
    order = numpy_rng(settings.seed, "preview").permutation(len(samples))[: settings.preview_rows]
    found = [samples[SampleRef(int(index), 0)] for index in sorted(order)]
    return [example for example in found if isinstance(example, Example) and not example.problems]


def _adapter_fit(settings: CheckSettings) -> str:
    """Return a line on the adapter to train. ValueError when it takes conditions with another number of channels."""
    condition, name = settings.condition, settings.adapter_model_name_or_path
    if name is None:
        return f"adapter     a new one with {condition.channels} input channels"
    found = find_adapter(name, settings.base.local_files_only)
    found.check_channels(condition)
    known = f", trained on {found.condition.kind}" if found.condition else ""
    return f"adapter     {found.place} with {condition.channels} input channels{known}: fits"


def _tokenizer(settings: CheckSettings) -> tuple[CLIPTokenizer | None, str]:
    """Load the base's tokenizer. Return None and a line for the report where it cannot be loaded: without a network
    everything else can still be checked."""
    place = settings.base.name
    try:
        place = str(resolve_base(settings.base.name).id_or_path)
        return CLIPTokenizer.from_pretrained(place, subfolder="tokenizer"), ""
    except OSError:
        return None, f"tokens      not counted: the tokenizer of {place} cannot be loaded"
