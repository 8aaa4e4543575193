"""What is measured, and how: nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How every cell is measured: on ``count`` test scenes with the same masks and noise, against ``references``
    scenes of the training part."""

    base: str = "micro"
    count: int = 200
    num_inference_steps: int = 20
    guidance_scale: float = 2.0
    scheduler: str = "ddim"
    batch_size: int = 16
    extractors: tuple[str, ...] = ("micro_clip", "efficientnet_lite0")
    references: int = 2048

    def __post_init__(self) -> None:
        for name, least in (("count", 2), ("num_inference_steps", 1), ("references", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
