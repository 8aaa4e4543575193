"""What the check of a data set finds: every row is read as the training would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import CLIPTokenizer

from localctl.base import resolve_base
from localctl.data.check import look_at_all, preview, write_report
from localctl.data.check_settings import CheckSettings
from localctl.data.files import FileSource, is_held_out, open_rows
from localctl.data.plan import SampleRef
from localctl.data.sample import Example, MaskedSamples
from localctl.random import numpy_rng


def check(settings: CheckSettings) -> str:
    """The report. ValueError for data that cannot be opened, and for an adapter that takes another condition."""
    data = settings.data
    if data.is_micro:
        raise ValueError("The embedded scenes need no check; name your own data, as data=imagefolder data.path=FOLDER.")
    fit = _adapter_fit(settings)
    target = Path(settings.preview).expanduser()
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"The preview {target} is no picture's name; end it in .png.")
    all_rows = open_rows(data, settings.condition, data.split)
    source = FileSource(all_rows, range(len(all_rows)), data, settings.condition)
    share = 0.0 if data.validation_split else data.validation_share
    held_out = sum(is_held_out(key, share) for key in all_rows.keys)
    tokens, limit, whose = _token_counter(settings)
    rows = look_at_all(source, settings.dataloader_num_workers)
    examples = _examples(MaskedSamples(source, settings.mask, settings.seed), settings)
    lines = [write_report(source, rows, held_out, tokens, limit) + whose, *fit]
    if examples:
        target.parent.mkdir(parents=True, exist_ok=True)
        preview(examples).save(target)
        lines.append(f"preview     {target}")
    return "\n".join(lines)


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
    folder = Path(name).expanduser()
    found = next(
        (f for f in (folder, folder / "adapter", folder / "t2iadapter") if (f / "config.json").is_file()), None
    )
    if found is None:
        raise ValueError(f"There is no adapter at {folder} (no config.json); check --adapter_model_name_or_path.")
    config = json.loads((found / "config.json").read_text())
    if config.get("in_channels") != condition.channels:
        raise ValueError(
            f"The adapter {found} takes conditions of {config.get('in_channels')} channels, but condition="
            f"{condition.kind} has {condition.channels}; choose another condition or condition.channels."
        )
    trained = (config.get("condition") or {}).get("kind")
    known = f", trained on {trained}" if trained else ""
    return [f"adapter     {found}, of {condition.channels} input channels{known}: fits"]


def _token_counter(settings: CheckSettings) -> tuple[Callable[[str], int] | None, int, str]:
    """How to count tokens, how many are read, and what to add to the report."""
    place = settings.base.name
    try:
        place = str(resolve_base(settings.base.name).id_or_path)
        tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer")
    except OSError:  # of a hub that cannot be reached: everything else can be checked
        return None, 0, f"\ntokens      not counted: the tokenizer of {place} cannot be loaded"
    return lambda caption: len(tokenizer(caption, verbose=False).input_ids), tokenizer.model_max_length, ""
