"""Signals, a full disk and numbers that are not finite, in the training process itself."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from log_helpers import logged
from process_helpers import checkpoint_contents, difference, finish, record_samples, sample_lines, start, wait_for
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.cli import train as train_adapter
from localctl.training import loop
from localctl.training.checkpoints import find_checkpoint, list_checkpoints, verify_checkpoint
from localctl.training.loop import NotFiniteError
from localctl.training.state import TrainState
from localctl.training.trackers import read_stats


def arguments(base, folder, *more):
    return [
        f"base={base}", f"output_dir={folder}", "data.count=6", "train_batch_size=2", "max_train_steps=6",
        "lr_warmup_steps=1", "logging_steps=1", "validation_steps=0", "checkpointing_steps=0", "report_to=none",
        "validation.count=2", "validation.batch_size=1", "resume_from_checkpoint=latest", "learning_rate=1e-3", *more,
    ]  # fmt: skip


def program(argv, lines: Path, seconds_per_step: float = 0.0) -> int:
    """Start train_adapter.py with its errors in a file, and its steps recorded and slowed down."""
    sys.stderr = lines.with_suffix(".err").open("w", buffering=1)
    sys.stdout = lines.with_suffix(".out").open("w", buffering=1)
    record_samples(lines)
    step = loop.training_step

    def slow(*values):
        time.sleep(seconds_per_step)
        return step(*values)

    loop.training_step = slow
    return train_adapter.main(argv)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_within_one_step(sd_folder, tmp_path, number, code):
    argv, lines = arguments(sd_folder, tmp_path / "out", "dataloader_num_workers=1"), tmp_path / "ids"
    process = start(program, argv, lines)
    wait_for(lambda: len(sample_lines(lines)) >= 2, process)
    os.kill(process.pid, number)
    begun = len(sample_lines(lines))
    assert finish(process) == code
    (step,) = list_checkpoints(tmp_path / "out")
    assert begun <= step <= begun + 1  # the step it was in, or the next where it came between two
    verify_checkpoint(tmp_path / "out" / f"checkpoint-{step}")
    assert f"Stopped after step {step} with a checkpoint" in lines.with_suffix(".out").read_text()
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_second_signal_leaves_at_once(sd_folder, tmp_path):
    lines = tmp_path / "ids"
    process = start(program, arguments(sd_folder, tmp_path / "out"), lines, 30.0)
    wait_for(lambda: sample_lines(lines) or (tmp_path / "out" / "config.yaml").exists(), process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, 10) == -signal.SIGTERM


def ended_workers(argv, lines: Path) -> int:
    """Run train_adapter.py, then report whether it left a worker process."""
    code = program(argv, lines, 0.3)
    return code if not multiprocessing.active_children() else 99


def test_ctrl_c_twice_ends_busy_workers_too(sd_folder, tmp_path):
    lines = tmp_path / "ids"
    argv = arguments(sd_folder, tmp_path / "out", "dataloader_num_workers=2", "max_train_steps=60")
    process = start(ended_workers, argv, lines)
    wait_for(lambda: len(sample_lines(lines)) >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process, 30) == 130
    assert "Traceback" not in lines.with_suffix(".err").read_text()


def test_a_killed_worker_ends_it_with_a_checkpoint_and_a_sentence(sd_folder, tmp_path):
    lines, out = tmp_path / "ids", tmp_path / "out"
    argv = arguments(sd_folder, out, "dataloader_num_workers=2", "max_train_steps=200")
    process = start(ended_workers, argv, lines)
    wait_for(lambda: len(sample_lines(lines)) >= 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert finish(process, 30) == 1
    (step,) = list_checkpoints(out)
    message = lines.with_suffix(".err").read_text().splitlines()[-1]
    assert "A data worker was killed (SIGKILL; out of memory?)" in message
    assert f"checkpoint-{step} holds all of the training" in message
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_at_once(sd_folder, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(loop, "new_state", lambda *values: os.kill(os.getpid(), number))
    assert train_adapter.main(arguments(sd_folder, tmp_path / "out")) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1].endswith("before the first step; nothing was trained.")
    assert not (tmp_path / "out").exists()


def test_a_signal_inside_validation_is_heard_and_the_validation_made_good(sd_folder, tmp_path):
    out, lines = tmp_path / "out", tmp_path / "ids"
    argv = arguments(sd_folder, out, "validation_steps=2", "validation.num_inference_steps=900", "max_train_steps=3")
    process = start(program, argv, lines)
    wait_for(lambda: (out / "stats.jsonl").exists() and len(read_stats(out)) == 2, process)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, 10) == 143
    assert list(list_checkpoints(out)) == [2] and len(read_stats(out)) == 2
    run = silent_run(
        tiny_settings(
            sd_folder, out, train_batch_size=2, validation_steps=2, max_train_steps=3, resume_from_checkpoint="latest"
        )
    )
    assert run.state.step == 2
    run.train()
    rows = read_stats(out)
    assert [(row["step"], "loss" in row) for row in rows] == [(1, True), (2, True), (2, False), (3, True), (3, False)]


def on_a_full_disk(argv, lines: Path) -> int:
    """The limit on the size of files simulates a full disk: a write fails half-way."""
    save = TrainState.save

    def limited(self, folder):
        if self.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return save(self, folder)

    TrainState.save = limited
    return program(argv, lines)


def test_a_full_disk_keeps_the_checkpoint_before(sd_folder, tmp_path):
    out, lines = tmp_path / "out", tmp_path / "ids"
    process = start(on_a_full_disk, arguments(sd_folder, out, "checkpointing_steps=1"), lines)
    assert finish(process) == 1
    message = lines.with_suffix(".err").read_text().splitlines()[-1]
    assert message.startswith("train_adapter.py: checkpoint-2 could not be saved in") and "latest" in message
    assert {p.name for p in out.iterdir()} == {"checkpoint-1", "stats.jsonl", "config.yaml"}
    said = logged()
    assert find_checkpoint(out, "latest") == out / "checkpoint-1" and not said
    assert (out / "checkpoint-1" / "optimizer.pt").stat().st_size > 100_000


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "optimizer.pt", 1000),
    "a bit of the adapter": lambda path: flip(path / "adapter" / "diffusion_pytorch_model.safetensors"),
    "a bit of the moments": lambda path: flip(path / "optimizer.pt"),
    "no state": lambda path: (path / "state.json").unlink(),
    "manifest": lambda path: (path / "manifest.json").write_bytes(b"\x00garbage"),
    "a bit of the manifest": lambda path: flip(path / "manifest.json"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(sd_folder, tmp_path_factory):
    """A run of 2 steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("saved")
    settings = tiny_settings(sd_folder, folder, max_train_steps=2, train_batch_size=2, checkpointing_steps=1)
    silent_run(settings).train()
    return settings


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(saved, tmp_path, damage):
    copy_run(saved, tmp_path)
    DAMAGES[damage](tmp_path / "checkpoint-2")
    said = logged()
    settings = replace(saved, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    run = silent_run(settings)
    assert run.state.step == 1 and "checkpoint-2" in said[0]
    if damage == "a bit of the moments":
        run.train()
        whole = checkpoint_contents(Path(saved.output_dir) / "checkpoint-2")
        assert difference(checkpoint_contents(tmp_path / "checkpoint-2"), whole) == []
        assert loss_log(tmp_path) == loss_log(Path(saved.output_dir))
        assert (tmp_path / "abandoned-checkpoint-2").exists()


def copy_run(settings, folder: Path) -> None:
    for path in Path(settings.output_dir).rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(settings.output_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def test_with_no_good_checkpoint_left_nothing_is_trained(saved, tmp_path, capsys):
    copy_run(saved, tmp_path)
    for step in (1, 2):
        flip(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    argv = arguments(saved.base.name, tmp_path)
    assert train_adapter.main(argv) == 2
    assert "All 2 checkpoints" in capsys.readouterr().err
    bad = tmp_path / "checkpoint-2"
    assert train_adapter.main([*argv, f"resume_from_checkpoint={bad}"]) == 2
    assert "is damaged: optimizer.pt" in capsys.readouterr().err
    assert len(loss_log(tmp_path)) == 2


def poisoned(key: str, epoch: int):
    """Return a ``sample_noise`` whose noise is NaN for one visit of one sample."""
    sample_noise = loop.sample_noise

    def sample(batch, *more):
        made = sample_noise(batch, *more)
        for row, visit in enumerate(zip(batch.keys, batch.epochs, strict=True)):
            if visit == (key, epoch):
                made.noise[row, 0, 0, 0] = torch.nan
        return made

    return sample


def test_nan_in_one_sample_stops_before_the_update_and_names_it(saved, tmp_path, monkeypatch):
    run = silent_run(replace(saved, output_dir=str(tmp_path), max_train_steps=6, checkpointing_steps=1))
    monkeypatch.setattr(loop, "sample_noise", poisoned("basic-train-3", 0))
    with pytest.raises(NotFiniteError, match=r"loss is not finite at step (\d) \(samples basic-train-3\)"):
        run.train()
    last = max(list_checkpoints(tmp_path), default=0)
    assert run.state.step == last < 3  # of 6 samples in batches of 2
    if last:  # nothing moved after it
        saved_parts = checkpoint_contents(tmp_path / f"checkpoint-{last}")["optimizer.pt"]
        assert difference(saved_parts["state"], run.state.optimizer.state_dict()["state"]) == []


def test_so_many_may_be_left_out_as_is_allowed(saved, tmp_path, monkeypatch):
    settings = replace(saved, output_dir=str(tmp_path), max_train_steps=6, checkpointing_steps=6)
    monkeypatch.setattr(loop, "sample_noise", poisoned("basic-train-3", 0))
    said = logged()
    run = silent_run(replace(settings, max_nonfinite_steps=1))
    run.train()
    assert run.state.skipped == 1 and sum("skipped, 1 so far" in line for line in said) == 1
    steps = run.state.optimizer.state_dict()["state"][0]["step"]
    assert run.state.step == 6 and int(steps) == 5
    assert sum(row["loss"] is None for row in loss_log(tmp_path)) == 1
