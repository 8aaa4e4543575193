"""`python -m localctl.data check ARGUMENTS`, with the arguments of `train_adapter.py`: reads every row as the training
would, prints counts, bad rows and what looks like a mistake, and writes a sheet of examples.

More arguments: `--preview FILE.png`, `--preview_rows 8`, `--adapter_model_name_or_path FOLDER` to compare channels with
an adapter. Ends with 0; 2 after a mistake in the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTokenizer

from localctl.adapter import check_config
from localctl.base import resolve_base
from localctl.data.check import look_at_all, preview, write_report
from localctl.data.files import FileSource, is_held_out, open_rows
from localctl.data.plan import SampleRef
from localctl.data.sample import Example, MaskedSamples
from localctl.files import read_json
from localctl.random import numpy_rng
from localctl.run.config import load_config
from localctl.run.program import one_sentence
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

PROGRAM = "python -m localctl.data"


@dataclass(kw_only=True)
class CheckSettings(TrainSettings):
    """A training's settings and what only the check needs. adapter_model_name_or_path: an adapter that must fit."""

    preview: str = "outputs/data_check.png"
    preview_rows: int = 8
    adapter_model_name_or_path: str | None = None


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """0 when the check ran, whatever it found; 2 after a mistake of the user's, named in one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] != "check" or {"-h", "--help"} & set(argv):
        print(f"usage: {PROGRAM} check data=imagefolder data.path=FOLDER [as for train_adapter.py ...]\n\n{__doc__}")
        return 0 if {"-h", "--help"} & set(argv) else 2
    settings = load_config(argv[1:], CheckSettings, aliases=ALIASES, free_groups=FREE_GROUPS)
    print(check(settings))
    return 0


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
    config = check_config(read_json(found / "config.json", "The adapter's"), found)
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


if __name__ == "__main__":
    sys.exit(main())
