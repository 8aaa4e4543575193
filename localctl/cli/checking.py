"""What ``python -m localctl.data check`` does: reads every row as the training would, and says what it found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import CLIPTokenizer

from localctl.adapter_files import find_adapter
from localctl.bases import resolve_base
from localctl.cli.check_settings import CheckSettings
from localctl.data.check import bad_rows, look_at_all, preview, write_report
from localctl.data.files import WITHOUT_VALIDATION, FileSource, held_out, open_rows, part_of
from localctl.data.plan import SampleRef
from localctl.data.rows import Rows
from localctl.data.sample import Example, MaskedSamples
from localctl.labels import brief
from localctl.messages import warning
from localctl.metrics.edges import MIN_EDGES
from localctl.seeding import numpy_rng
from localctl.training.summary import remarks
from localctl.training.validation import choose_cases

_NAMED = 3  # so few held-out examples are said by name


def check(settings: CheckSettings) -> str:
    """The report. ValueError for data that cannot be opened, and for an adapter that takes another condition."""
    data = settings.data
    if data.is_micro:
        raise ValueError("The embedded scenes need no check; name your own data, as data=imagefolder data.path=FOLDER.")
    fit = _adapter_fit(settings)
    target = Path(settings.preview).expanduser()
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"The preview {target} is no picture's name; end it in .png.")
    rows = open_rows(data, settings.condition, data.split)
    held = open_rows(data, settings.condition, data.validation_split) if data.validation_split else None
    source = FileSource(rows, range(len(rows)), data, settings.condition)
    workers = settings.dataloader_num_workers
    tokens, limit, whose = _token_counter(settings)
    looked_at = look_at_all(source, workers)
    parts, notes, warnings = _training(settings, rows, held or rows)
    lines = [write_report(source, looked_at, parts, notes, tokens, limit) + whose, *fit]
    if held is not None:
        of_split = look_at_all(FileSource(held, range(len(held)), data, settings.condition), workers)
        lines.append(f"validation  {bad_rows(of_split)[0]}, in the split {data.validation_split!r}")
        lines += bad_rows(of_split)[1:]
    examples = _examples(MaskedSamples(source, settings.mask, settings.seed), settings)
    lines += map(warning, warnings)
    if examples:
        target.parent.mkdir(parents=True, exist_ok=True)
        preview(examples).save(target)
        lines.append(f"preview     {target}")
    return "\n".join(lines)


def _training(settings: CheckSettings, rows: Rows, held: Rows) -> tuple[str, list[str], list[str]]:
    """What a training would make of the rows: how many it trains on and holds out, what it would say of them, and what
    it would stop with."""
    data = settings.data
    notes: list[str] = []
    warnings: list[str] = []
    parts: dict[str, FileSource] = {}
    names = ("train", "val") if settings.validation_steps else ("train",)
    for name in names:
        try:
            of_name = held if name == "val" else rows
            parts[name] = part_of(of_name, data, settings.condition, name, WITHOUT_VALIDATION)
        except ValueError as error:
            warnings.append(f"a training would stop: {error}")
    if "val" in parts:
        try:
            if not choose_cases(parts["val"], settings)[0].scored:
                notes.append(f"no held-out mask has {MIN_EDGES} edge pixels in it, so validation will have no score")
        except ValueError as error:
            warnings.append(f"a training would stop: {error}")
    count = {name: len(part) for name, part in parts.items()}
    if len(names) == 1:
        count["val"] = 0 if data.validation_split else sum(held_out(rows.keys, data.validation_share)[0])
    said = f"{count.get('train', 0)} to train on, {count.get('val', 0)} for validation"
    if "val" in parts and 0 < count["val"] <= _NAMED and not (parts["val"].note or data.validation_split):
        keys = [brief(parts["val"].rows.keys[index]) for index in parts["val"].indices]
        notes.append(f"held out for validation: {', '.join(keys)}")
    return said, [*remarks(settings, next(iter(parts.values()), None)), *notes], warnings


def _examples(samples: MaskedSamples, settings: CheckSettings) -> list[Example]:
    """Some usable examples from all over the data, as the first epoch shows them."""
    order = numpy_rng(settings.seed, "preview").permutation(len(samples))[: settings.preview_rows]
    found = [samples[SampleRef(int(index), 0)] for index in sorted(order)]
    return [example for example in found if isinstance(example, Example) and not example.problems]


def _adapter_fit(settings: CheckSettings) -> list[str]:
    """A line on the adapter to continue from. ValueError when its input has other channels than the condition."""
    condition, name = settings.condition, settings.adapter_model_name_or_path
    if name is None:
        return [f"adapter     a new one, of {condition.channels} input channels"]
    found = find_adapter(name, settings.base.local_files_only)
    channels = found.config.get("in_channels", 3)  # T2IAdapter's default
    if channels != condition.channels:
        raise ValueError(
            f"The adapter {found.place} takes conditions of {channels} channels, but condition="
            f"{condition.kind} has {condition.channels}; choose another condition or condition.channels."
        )
    trained = (found.config.get("condition") or {}).get("kind")
    known = f", trained on {trained}" if trained else ""
    return [f"adapter     {found.place}, of {condition.channels} input channels{known}: fits"]


def _token_counter(settings: CheckSettings) -> tuple[Callable[[str], int] | None, int, str]:
    """How to count tokens, how many are read, and what to add to the report."""
    place = settings.base.name
    try:
        place = str(resolve_base(settings.base.name).id_or_path)
        tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer")
    except OSError:  # of a hub that cannot be reached: everything else can be checked
        return None, 0, f"\ntokens      not counted: the tokenizer of {place} cannot be loaded"
    return lambda caption: len(tokenizer(caption, verbose=False).input_ids), tokenizer.model_max_length, ""
