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
from typing import TYPE_CHECKING

from localctl.bases import resolve_base
from localctl.run.config import settings_or_help
from localctl.run.program import one_sentence
from localctl.training.other_flags import ELSEWHERE
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

if TYPE_CHECKING:  # what loads torch is imported after the flags are read
    from localctl.data.files import FileSource
    from localctl.data.rows import Rows
    from localctl.data.sample import Example, MaskedSamples

PROGRAM = "python -m localctl.data"


@dataclass(kw_only=True)
class CheckSettings(TrainSettings):
    """A training's settings and what only the check needs.

    preview: where the sheet of examples goes, an image file.
    preview_rows: examples on it.
    adapter_model_name_or_path: an adapter that must fit.
    """

    preview: str = "outputs/data_check.png"
    preview_rows: int = 8
    adapter_model_name_or_path: str | None = None


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """0 when the check ran, whatever it found; 2 after a mistake of the user's, named in one sentence."""
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = {"-h", "--help", "--version"} & set(argv)
    if argv[:1] != ["check"] and not asked:
        raise ValueError("Say what to do: check, as in `python -m localctl.data check data.path=FOLDER`; see --help.")
    settings = settings_or_help(
        f"{PROGRAM} check",
        argv[1:] if argv[:1] == ["check"] else argv,
        CheckSettings,
        about=__doc__,
        aliases=ALIASES,
        free_groups=FREE_GROUPS,
        elsewhere=ELSEWHERE,
    )
    if settings is not None:
        print(check(settings))
    return 0


def check(settings: CheckSettings) -> str:
    """The report. ValueError for data that cannot be opened, and for an adapter that takes another condition."""
    from localctl.data.check import bad_rows, look_at_all, preview, write_report
    from localctl.data.files import FileSource, open_rows
    from localctl.data.sample import MaskedSamples

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
    tokens, limit, whose = _token_counter(settings)
    looked_at = look_at_all(source, settings.dataloader_num_workers)
    parts, notes, warnings = _training(settings, rows, held or rows)
    lines = [write_report(source, looked_at, parts, notes, tokens, limit) + whose, *fit]
    if held is not None:
        of_split = look_at_all(FileSource(held, range(len(held)), data, settings.condition))
        lines.append(f"validation  {bad_rows(of_split)[0]}, in the split {data.validation_split!r}")
        lines += bad_rows(of_split)[1:]
    examples = _examples(MaskedSamples(source, settings.mask, settings.seed), settings)
    lines += [f"WARNING     {warning}" for warning in warnings]
    if examples:
        target.parent.mkdir(parents=True, exist_ok=True)
        preview(examples).save(target)
        lines.append(f"preview     {target}")
    return "\n".join(lines)


def _training(settings: CheckSettings, rows: Rows, held: Rows) -> tuple[str, list[str], list[str]]:
    """What a training would make of the rows: how many it trains on and holds out, what it would say of them, and what
    it would stop with."""
    from localctl.data.files import WITHOUT_VALIDATION, held_out, part_of
    from localctl.training.data_watch import remarks
    from localctl.training.validation import MIN_EDGES, choose_cases

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
    return said, [*remarks(settings, next(iter(parts.values()), None)), *notes], warnings


def _examples(samples: MaskedSamples, settings: CheckSettings) -> list[Example]:
    """Some usable examples from all over the data, as the first epoch shows them."""
    from localctl.data.plan import SampleRef
    from localctl.data.sample import Example
    from localctl.random import numpy_rng

    order = numpy_rng(settings.seed, "preview").permutation(len(samples))[: settings.preview_rows]
    found = [samples[SampleRef(int(index), 0)] for index in sorted(order)]
    return [example for example in found if isinstance(example, Example) and not example.problems]


def _adapter_fit(settings: CheckSettings) -> list[str]:
    """A line on the adapter to continue from. ValueError when its input has other channels than the condition."""
    condition, name = settings.condition, settings.adapter_model_name_or_path
    if name is None:
        return [f"adapter     a new one, of {condition.channels} input channels"]
    from localctl.adapter_files import find_adapter

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
    from transformers import CLIPTokenizer

    place = settings.base.name
    try:
        place = str(resolve_base(settings.base.name).id_or_path)
        tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer")
    except OSError:  # of a hub that cannot be reached: everything else can be checked
        return None, 0, f"\ntokens      not counted: the tokenizer of {place} cannot be loaded"
    return lambda caption: len(tokenizer(caption, verbose=False).input_ids), tokenizer.model_max_length, ""


if __name__ == "__main__":
    sys.exit(main())
