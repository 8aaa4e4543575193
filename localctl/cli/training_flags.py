"""A training's settings from the command line, for every program that takes them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from localctl.cli.config import settings_or_help
from localctl.messages import loading
from localctl.records import record
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

_OTHER_FLAGS = json.loads(Path(__file__).with_name("other_flags.json").read_text(encoding="utf-8"))
# flag of other training scripts, without its dashes -> a sentence about what to do instead
ELSEWHERE: Mapping[str, str] = {name: text for text, names in _OTHER_FLAGS.items() for name in names}
Settings = TypeVar("Settings", bound=TrainSettings)


def training_settings(program: str, argv: Sequence[str], schema: type[Settings], about: str | None) -> Settings | None:
    """As :func:`~localctl.cli.config.settings_or_help`, with the names that a training's settings have elsewhere."""
    return settings_or_help(
        program, argv, schema, about=about, aliases=ALIASES, free_groups=FREE_GROUPS, elsewhere=ELSEWHERE
    )


def settings_to_run(
    program: str, argv: Sequence[str], schema: type[Settings], about: str | None, estimate: str
) -> Settings | None:
    """As :func:`training_settings`; None also after ``--dry_run``, which prints the report of the module ``estimate``.

    ValueError for settings that cannot work."""
    settings = training_settings(program, argv, schema, about)
    if settings is None or not settings.dry_run:
        return settings
    with loading():
        report = importlib.import_module(estimate).report
    print(report(settings))
    return None


@record()
@dataclass(kw_only=True)
class CheckSettings(TrainSettings):
    """The settings of training, and those of the check itself.

    preview: image file to write the sheet of examples to.
    preview_rows: number of examples on the sheet.
    adapter_model_name_or_path: an adapter that must take these conditions.
    """

    preview: str = "outputs/data_check.png"
    preview_rows: int = 8
    adapter_model_name_or_path: str | None = None
