"""Train once per loss filter on small images, in one process or several: run by torchrun, or imported.

torchrun --standalone --nproc_per_node 2 tests/training/ddp_worker.py BASE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from training_helpers import silent_run, tiny_settings

from localctl.data.sample import Example
from localctl.distributed import leave
from localctl.losses import FILTERS, LossConfig
from localctl.seeding import generator
from localctl.training import data
from localctl.training.settings import TrainSettings

SIDE, COUNT, GLOBAL_BATCH, UPDATES = 64, 10, 4, 32


class SmallPictures:
    """Noise with conditions and masks of very different areas (1 % to all), so that a mean over a whole batch would not
    be the mean over its samples."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = generator(0, "picture", index)
        mask = torch.zeros(1, SIDE, SIDE)
        side = (6, 16, 32, 64)[index % 4]
        mask[:, :side, :side] = 1
        pixels = torch.rand(3, SIDE, SIDE, generator=rng) * 2 - 1
        condition = (torch.rand(1, SIDE, SIDE, generator=rng) > 0.7).float()
        return Example(f"picture-{index}", pixels, condition, "a picture", mask=mask)


def small_pictures(settings: TrainSettings, split: str) -> SmallPictures:
    """Replace ``data.make_source``."""
    return SmallPictures()


def settings_for(base: Path, folder: Path, name: str, processes: int, **changes: Any) -> TrainSettings:
    """32 updates of 4 samples in all, at the published learning rate."""
    options: dict[str, Any] = {"learning_rate": 8e-5, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}
    options |= {"loss": LossConfig(filter=name), "max_train_steps": UPDATES, "logging_steps": 8}
    options |= {"train_batch_size": GLOBAL_BATCH // processes}
    return tiny_settings(base, folder, **(options | changes))


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.state.models.plain_adapter.state_dict().items()}


def main(base: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    data.make_source = small_pictures
    for name in FILTERS:
        # The first also validates and saves, which only the first process does, several times.
        events = {"validation_steps": 16, "checkpointing_steps": 8} if name == "none" else {}
        run = silent_run(settings_for(base, folder / name, name, 2, **events))
        assert run.state.accelerator.num_processes == 2, "not two processes"
        run.train()
        if run.main:
            torch.save(weights(run), folder / f"{name}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
