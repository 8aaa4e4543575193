"""The losses of 50 steps on the embedded base equal stored values: a change of any needs a deliberate update.

LOCALCTL_UPDATE_GOLDENS=1 pytest tests/training/test_golden_losses.py
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from depth import depth
from process_helpers import finish, start
from tolerances import rounding
from training_helpers import loss_log, silent_run

from localctl.pipelines import BaseConfig
from localctl.training.resume import weights_fingerprint
from localctl.training.settings import AdapterConfig, DataConfig, TrainSettings

GOLDEN = Path(__file__).parents[1] / "goldens" / "losses_of_50_steps.json"
UPDATE = "LOCALCTL_UPDATE_GOLDENS"
NAMES = ("loss", "denoising", "local_raw", "learning_rate", "grad_norm")


def train(folder: Path) -> None:
    """The default run, except for its length, its size and its masks, in float32 on one thread."""
    settings = TrainSettings(
        base=BaseConfig(name="micro"), data=DataConfig(count=20), output_dir=str(folder), max_train_steps=50,
        adapter=AdapterConfig(mask_resize="area", mask_margin=0), proportion_full_masks=0.0,
        train_batch_size=1, lr_warmup_steps=10, logging_steps=1, validation_steps=0, checkpointing_steps=0,
        report_to="none", mixed_precision="no",
    )  # fmt: skip
    run = silent_run(settings)
    models = run.state.models
    (folder / "base").write_text(weights_fingerprint(models.frozen))
    passed = (models.vae.encoder, models.pipe.text_encoder, models.plain_adapter, models.network)
    (folder / "depth").write_text(str(depth(*passed)))
    run.train()


def processor() -> str:
    """The kind of CPU: what its vectors are like, and who made it, for libraries choose their kernels by both."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    maker = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())
    return f"{torch.backends.cpu.get_cpu_capability()} {maker}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("golden")
    assert finish(start(train, folder), 300) == 0
    return {
        "base": (folder / "base").read_text(),
        "cpu": processor(),
        "depth": int((folder / "depth").read_text()),
        "losses": [{name: row[name] for name in NAMES} for row in loss_log(folder)],
    }


def test_the_losses_are_the_golden_ones(measured):
    """To 1e-6 on the kind of CPU they were computed on. Other kinds sum in another order: then to the rounding of all
    updates up to then, each with a pass forward, one back to the features and one to the weights, and to no more than
    1e-3: an AVX512 machine was out by 1.1e-4 at most."""
    if os.environ.get(UPDATE):
        GOLDEN.write_text(json.dumps(measured, indent=0) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert measured["base"] == golden["base"], f"the weights of the embedded base changed: run again with {UPDATE}=1"
    assert len(golden["losses"]) == len(measured["losses"]) == 50
    for step, (row, expected) in enumerate(zip(measured["losses"], golden["losses"], strict=True), start=1):
        tolerance = 1e-6 if measured["cpu"] == golden["cpu"] else min(1e-3, rounding(3 * measured["depth"] * step))
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance), f"step {step}"
