"""A training's settings from the command line, for every program that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from localctl.cli.config import settings_or_help
from localctl.cli.other_flags import ELSEWHERE
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)


def training_settings(program: str, argv: Sequence[str], schema: type[Settings], about: str | None) -> Settings | None:
    """As :func:`~localctl.cli.config.settings_or_help`, with the names that a training's settings have elsewhere."""
    return settings_or_help(
        program, argv, schema, about=about, aliases=ALIASES, free_groups=FREE_GROUPS, elsewhere=ELSEWHERE
    )
