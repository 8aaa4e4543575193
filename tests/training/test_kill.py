"""kill -9 at seeded random moments: the resumed run equals the uninterrupted run, bit for bit."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from process_helpers import checkpoint_contents, difference, finish, record_samples, sample_lines, start, wait_for
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.training.checkpoints import list_checkpoints
from localctl.training.settings import DataConfig, TrainSettings

SAMPLES, BATCH, SAVE_EVERY = 5, 2, 2  # the third step extends into the next epoch


def train(settings: TrainSettings, lines: Path) -> None:
    torch.compiler.set_default_backend("aot_eager")  # for settings.compile: the default needs a C++ compiler
    record_samples(lines)
    silent_run(settings).train()


def killed_settings(base: Path, folder: Path, steps: int, workers: int, **changes: Any) -> TrainSettings:
    """Settings that save every 2 steps and log every 3, so that kills interrupt periods of both."""
    return tiny_settings(
        base, folder, data=DataConfig(count=SAMPLES), train_batch_size=BATCH, max_train_steps=steps, logging_steps=3,
        checkpointing_steps=SAVE_EVERY, dataloader_num_workers=workers, resume_from_checkpoint="latest",
        use_ema=True, **changes,
    )  # fmt: skip


def kill_at(settings: TrainSettings, lines: Path, more: int, saving: bool, delay: float) -> int:
    """Train, wait for ``more`` further steps to begin (and for a checkpoint to be half written), then kill. Returns
    from which step the process had gone on."""
    folder, before = Path(settings.output_dir), len(sample_lines(lines))
    resumed = max(list_checkpoints(folder), default=0)
    process = start(train, settings, lines)
    wait_for(lambda: len(sample_lines(lines)) >= before + more, process)
    if saving:
        wait_for(lambda: any(folder.glob(".checkpoint-*.tmp")), process)
    time.sleep(delay)
    process.kill()
    assert finish(process) == -9
    return resumed


def attempts(lines: list, begun: list[tuple[int, int]]) -> dict[int, list]:
    """Step -> what each attempt at it saw. ``begun``: (number of the line, step) at which each process began."""
    seen: dict[int, list] = {}
    for number, line in enumerate(lines):
        first, step = max(pair for pair in begun if pair[0] <= number)
        seen.setdefault(step + 1 + number - first, []).append(line)
    return seen


def check_kills(base: Path, folder: Path, *, kills: int, steps: int, workers: int, seed: int, **changes: Any) -> None:
    rng = random.Random(seed)
    straight = killed_settings(base, folder / "straight", steps, workers=0, **changes)
    assert finish(start(train, straight, folder / "straight.ids"), 600) == 0
    settings = replace(straight, output_dir=str(folder / "killed"), dataloader_num_workers=workers)
    lines, first_epoch = folder / "ids", SAMPLES // BATCH
    begun, killed_at = [], []
    for number in range(kills):
        saving = number % 2 == 1
        last = max(list_checkpoints(folder / "killed"), default=0)
        # The first in epoch 0, the last beyond it; never so far that a process could reach the end before it is killed.
        more = 1 if number == 0 else rng.randint(1, max(1, min(SAVE_EVERY + 1, steps - last - 2)))
        more = max(more, first_epoch + 1 - last) if number == kills - 1 else more
        first = len(sample_lines(lines))
        begun.append((first, kill_at(settings, lines, more, saving, rng.uniform(0, 0.02 if saving else 0.1))))
        killed_at.append(begun[-1][1] + len(sample_lines(lines)) - first)
    begun.append((len(sample_lines(lines)), max(list_checkpoints(folder / "killed"), default=0)))
    assert finish(start(train, settings, lines), 600) == 0
    assert min(killed_at) <= first_epoch < max(killed_at), f"killed in steps {killed_at}"

    whole = sample_lines(folder / "straight.ids")
    seen = attempts(sample_lines(lines), begun)
    assert [seen[step][-1] for step in sorted(seen)] == whole
    assert all(line == lines[0] for lines in seen.values() for line in lines)
    assert loss_log(folder / "killed") == loss_log(folder / "straight")
    ends = [list_checkpoints(folder / name) for name in ("killed", "straight")]
    assert list(ends[0]) == list(ends[1]) and max(ends[0]) == steps
    for step in ends[0]:
        assert difference(checkpoint_contents(ends[0][step]), checkpoint_contents(ends[1][step])) == []
    assert not list((folder / "killed").glob(".checkpoint-*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twice(sd_folder, tmp_path, workers):
    check_kills(sd_folder, tmp_path, kills=2, steps=7, workers=workers, seed=workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_ten_times(sd_folder, tmp_path, workers):
    check_kills(sd_folder, tmp_path, kills=10, steps=25, workers=workers, seed=10 + workers)


@pytest.mark.slow
def test_killed_while_compiled(sd_folder, tmp_path):
    check_kills(sd_folder, tmp_path, kills=4, steps=13, workers=2, seed=5, compile=True)


def test_the_comparison_sees_one_bit(sd_folder, tmp_path):
    silent_run(killed_settings(sd_folder, tmp_path, 2, workers=0)).train()
    folder = tmp_path / "checkpoint-2"
    contents, other = checkpoint_contents(folder), checkpoint_contents(folder)
    assert difference(contents, other) == []
    names = {"adapter/diffusion_pytorch_model.safetensors", "optimizer.pt", "ema.pt", "state.json"}
    assert set(contents) >= names
    moments = other["optimizer.pt"]["state"][0]
    moments["exp_avg"].view(-1)[0] += 1e-6
    assert difference(contents, other) == ["/optimizer.pt/state/0/exp_avg"]
    del moments["exp_avg_sq"]
    assert "/optimizer.pt/state/0/exp_avg_sq" in difference(contents, other)
