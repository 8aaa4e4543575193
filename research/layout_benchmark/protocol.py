"""What is measured, and how: nothing here loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from localctl.control.presets import NONE
from research import flags

SINGLE = ("bias", "dense", "guidance", "forward")
PAIRS = ("bias+guidance", "bias+dense")
METHODS = (NONE, *SINGLE, *PAIRS)  # as ``sample.py --compare`` names them


@dataclass(frozen=True)
class Protocol(flags.Protocol):
    """Every method with the same layouts and seeds.

    regions: how many the layouts have, in turn. cost: whether time, memory and attention are measured, too.
    guidance_scale: None, the base's own. Methods may ask for another scheduler and scale (``Method.sampling``).
    """

    LEAST: ClassVar[Mapping[str, int]] = {"layouts": 2, **flags.Protocol.LEAST}

    split: str = "test"
    layouts: int = 200
    regions: tuple[int, ...] = (2, 1, 2, 3)
    seeds: tuple[int, ...] = (0, 1)
    cost: bool = True
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"The seeds must be different, and at least one, not {list(self.seeds)}.")
