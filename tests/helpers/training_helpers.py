"""Small training runs on the tiny pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localctl.data import DataConfig
from localctl.pipelines import BaseConfig
from localctl.training.loop import prepare
from localctl.training.settings import TrainSettings, ValidationConfig
from localctl.training.trackers import read_stats

TIMES = ("images_per_second", "data_wait_share")


def tiny_settings(base: Path, output_dir: Path, **changes: Any) -> TrainSettings:
    """6 scenes, batches of 4: the second step crosses into the next epoch."""
    options: dict[str, Any] = {
        "base": BaseConfig(name=str(base)),
        "data": DataConfig(count=6),
        "validation": ValidationConfig(count=2, rows=1, num_inference_steps=2),
        "output_dir": str(output_dir),
        "max_train_steps": 4,
        "train_batch_size": 4,
        "lr_warmup_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "report_to": "none",
    }
    return TrainSettings(**(options | changes))


def silent_run(settings: TrainSettings):
    return prepare(settings)


def loss_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of training steps without what depends on the clock."""
    rows = [row for row in read_stats(folder) if "loss" in row]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
