"""What is measured, and how: nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass

from localctl.cli.sample_record import NONE

SINGLE = ("bias", "dense", "guidance", "forward")
PAIRS = ("bias+guidance", "bias+dense")
METHODS = (NONE, *SINGLE, *PAIRS)  # as ``sample.py --compare`` names them


@dataclass(frozen=True)
class Protocol:
    """How every method is measured: the same layouts and seeds, against ``references`` scenes of the training part.

    regions: how many the layouts have, in turn. cost: whether time, memory and attention are measured, too.
    guidance_scale: None, the base's own. Methods may ask for another scheduler and scale (``Method.sampling``).
    """

    base: str = "micro"
    split: str = "test"
    layouts: int = 200
    regions: tuple[int, ...] = (2, 1, 2, 3)
    seeds: tuple[int, ...] = (0, 1)
    num_inference_steps: int = 30
    scheduler: str = "ddim"
    extractors: tuple[str, ...] = ("micro_clip",)
    references: int = 2048
    cost: bool = True
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("layouts", 2), ("num_inference_steps", 1), ("references", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"The seeds must be different, and at least one, not {list(self.seeds)}.")
