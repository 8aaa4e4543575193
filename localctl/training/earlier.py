"""Defaults of earlier versions, for their checkpoints and records."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from localctl.redaction import flat
from localctl.training.schedule import section
from localctl.training.settings import TrainSettings

logger = logging.getLogger(__name__)
# What versions without ``adapter.mask_margin`` did where their records do not name it.
EARLIER: dict[str, Any] = {
    "adapter.mask_margin": 0,
    "adapter.mask_resize": "area",
    "proportion_full_masks": 0.0,
}


def as_earlier(settings: TrainSettings, before: Mapping[str, Any]) -> TrainSettings:
    """Return the settings for continuing the run ``before``: where it is of an earlier version and they are a default
    of today, as that run had them. What changes is logged."""
    recorded = flat(section(before, "settings"))
    if "adapter.mask_margin" in recorded:
        return settings
    own = settings.base_defaults
    changed: dict[str, dict[str, Any]] = {"": {}, "adapter": {}}
    for key, default in EARLIER.items():
        part, _, name = key.rpartition(".")
        now, value = getattr(settings.adapter if part else settings, name), recorded.get(key, default)
        if now == getattr(own, name) and now != value:
            changed[part][name] = value
            logger.info(f"{key}={value}, as in the checkpoint, which is of an earlier version; the default is {now}.")
    return replace(settings, adapter=replace(settings.adapter, **changed["adapter"]), **changed[""])
