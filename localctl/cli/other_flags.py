"""Flags of other training scripts that are not settings here, and their replacements, from ``other_flags.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_SENTENCES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# flag, without its dashes -> a sentence about what to do instead
ELSEWHERE: Mapping[str, str] = {name: text for text, names in _SENTENCES.items() for name in names}
