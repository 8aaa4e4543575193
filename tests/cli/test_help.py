"""Every setting of every program is explained in `--help`, with the values that it may have."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from localctl.bases import BASES, DTYPE_NAMES, SCHEDULERS
from localctl.cli.help import descriptions, sections
from localctl.cli.training_flags import CheckSettings
from localctl.data.config import INTERPOLATIONS, LOCAL_FORMATS
from localctl.evaluation.settings import PROMPTS, FidSettings
from localctl.losses import FILTERS
from localctl.metrics import EXTRACTORS
from localctl.micro import PROFILES
from localctl.settings import (
    ADAPTER_TYPES,
    CHANNELS,
    LOSS_FILTERS,
    MASK_KINDS,
    MASK_RESIZE,
    NORMALISE,
    REPORT_TO,
    SCHEDULES,
    TIMESTEP_SAMPLINGS,
)
from localctl.training.settings import LR_SCHEDULERS, TrainSettings
from research.layout_predictor.settings import LayoutTrainSettings

CHOICES: dict[str, Any] = {
    "base.name": BASES,
    "base.dtype": DTYPE_NAMES,
    "data.name": LOCAL_FORMATS,
    "data.profile": PROFILES,
    "data.conditioning_interpolation": INTERPOLATIONS,
    "condition.kind": CHANNELS,
    "mask.kind": MASK_KINDS,
    "loss.filter": LOSS_FILTERS,
    "loss.schedule": SCHEDULES,
    "loss.normalise": NORMALISE,
    "loss.mask_resize": MASK_RESIZE,
    "adapter.mask_resize": MASK_RESIZE,
    "adapter.adapter_type": ADAPTER_TYPES,
    "validation.scheduler": SCHEDULERS,
    "early_stopping.scheduler": SCHEDULERS,
    "report_to": REPORT_TO,
    "mixed_precision": ("no", "fp16", "bf16"),
    "lr_scheduler": LR_SCHEDULERS,
    "timestep_sampling": TIMESTEP_SAMPLINGS,
}


def explained(defaults: object) -> dict[str, str]:
    """Key -> its text, for every setting."""
    found = {}
    for _, prefix, section in sections(defaults):
        texts = descriptions(type(section))
        names = [field.name for field in fields(section) if not is_dataclass(getattr(section, field.name))]
        found |= {prefix + name: texts.get(name, "") for name in names}
    return found


@pytest.mark.parametrize("schema", [TrainSettings, CheckSettings, FidSettings, LayoutTrainSettings])
def test_every_setting_has_words(schema: type) -> None:
    texts = explained(schema())
    assert [key for key, text in texts.items() if len(text) < 8] == []
    assert [key for key, text in texts.items() if len(text) > 400] == []


def test_the_words_name_every_choice() -> None:
    texts = explained(TrainSettings())
    for key, choices in CHOICES.items():
        assert [choice for choice in choices if choice not in texts[key]] == [], key
    texts = explained(FidSettings())
    assert all(choice in texts["extractor"] for choice in EXTRACTORS)
    assert all(choice in texts["prompts"] for choice in PROMPTS)
    assert all(choice in explained(LayoutTrainSettings())["data.name"] for choice in ("micro", "coco"))


def test_every_filter_of_the_loss_is_there() -> None:
    assert (*FILTERS, "edges") == LOSS_FILTERS
