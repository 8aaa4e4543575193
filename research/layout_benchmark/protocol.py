"""The protocol and the names of the methods; nothing here loads torch."""

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
    """Every method is measured with the same layouts and seeds.

    regions: number of regions of the layouts, in turn. cost: whether to measure time, memory and attention, too.
    guidance_scale: None = that of the base. A method may have another scheduler and scale (``Method.sampling``).

    Raises:
        ValueError: a value is out of range, or seeds are repeated or missing.
    """

    LEAST: ClassVar[Mapping[str, int]] = {"layouts": 2, **flags.Protocol.LEAST}

    split: str = "test"
    layouts: int = 200
    regions: tuple[int, ...] = (2, 1, 2, 3)
    seeds: tuple[int, ...] = (0,)
    cost: bool = True
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"The seeds must be different, and there must be at least one, not {list(self.seeds)}.")
