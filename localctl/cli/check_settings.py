"""What `python -m localctl.data check` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from localctl.records import record
from localctl.training.settings import TrainSettings


@record()
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
