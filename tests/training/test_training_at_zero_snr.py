"""Training, with its validation and its score, on a base whose schedule ends at zero signal."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import pytest
from diffusers import StableDiffusionPipeline
from log_helpers import logged
from training_helpers import silent_run, tiny_settings

from localctl.training.settings import ValidationConfig
from localctl.training.trackers import read_stats


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", pytest.param("DDPMScheduler", marks=pytest.mark.slow), "EulerDiscreteScheduler"]
)
def test_training_validates_and_scores(name: str, v_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    v_pipe.scheduler = getattr(diffusers, name).from_config(v_pipe.scheduler.config, **options)
    v_pipe.save_pretrained(tmp_path / "base")
    validation = ValidationConfig(count=2, rows=1, num_inference_steps=2)
    settings = tiny_settings(
        tmp_path / "base", tmp_path / "out", validation=validation, validation_steps=2, max_train_steps=2
    )
    said = logged()
    result = silent_run(settings).train()
    rows = read_stats(Path(settings.output_dir))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert result.fidelity is not None and any("edges in the mask F1" in line for line in said), said
