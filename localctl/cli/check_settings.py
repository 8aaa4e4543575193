"""Settings of `python -m localctl.data check`."""

from __future__ import annotations

from dataclasses import dataclass

from localctl.records import record
from localctl.training.settings import TrainSettings


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
