"""Failures of events between the steps, or after them, never end the training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from log_helpers import logged
from safetensors import SafetensorError
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.adapter import LocalAdapter
from localctl.data import Example, collate
from localctl.data.bad_rows import Quarantine, TooManyBadRows
from localctl.data.workers import WorkerError
from localctl.lock import LOCK, FolderInUse, FolderLock
from localctl.training import loop
from localctl.training import trackers as logging
from localctl.training.checkpoints import CheckpointError, list_checkpoints, verify_checkpoint
from localctl.training.data import DataWatch
from localctl.training.loop import prepare
from localctl.training.settings import EarlyStoppingConfig
from localctl.training.state import TrainState
from localctl.training.trackers import Trackers, read_stats
from localctl.training.validation import Validator

SCORED = EarlyStoppingConfig(every=2)


def raising(error):
    def work(*args, **options):
        raise error

    return work


def validations(folder):
    return [row["step"] for row in read_stats(folder) if "validation/f1" in row]


@pytest.fixture
def settings(sd_folder, tmp_path):
    return tiny_settings(sd_folder, tmp_path, train_batch_size=2, max_train_steps=4, checkpointing_steps=2)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("can't measure\nmultiline"),
        pytest.param(OSError(28, "full"), marks=pytest.mark.slow),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_validation_that_fails_is_said_and_the_training_goes_on(settings, tmp_path, monkeypatch, error):
    """The checkpoint of the step exists already; a resume at that step does not fail either."""
    seen = []

    def fails(self, beat):
        seen.append(max(list_checkpoints(tmp_path)))
        raise error

    monkeypatch.setattr(Validator, "run", fails)
    said = logged()
    settings = replace(settings, validation_steps=2)
    silent_run(settings).train(stop=lambda step: step == 3)
    assert seen == [2] and sum(line.startswith("warning: step 2: no validation") for line in said) == 1
    assert all("\n" not in line for line in said if "warning:" in line)
    shutil.rmtree(tmp_path / "checkpoint-3")
    run = silent_run(replace(settings, resume_from_checkpoint="latest"))
    assert run.state.step == 2 and run.train().step == 4
    assert (tmp_path / "adapter" / "config.json").exists() and [row["step"] for row in loss_log(tmp_path)] == [
        1,
        2,
        3,
        4,
    ]


def test_signals_and_data_that_cannot_be_used_keep_their_meaning(settings, tmp_path, monkeypatch):
    for error in (KeyboardInterrupt(), TooManyBadRows("too many")):
        monkeypatch.setattr(Validator, "run", raising(error))
        with pytest.raises(type(error)):
            silent_run(replace(settings, validation_steps=2, overwrite_output_dir=True)).train()
        assert list(list_checkpoints(tmp_path)) == [2] and not (tmp_path / LOCK).exists()


def test_a_validation_is_logged_once_though_its_checkpoint_is_older(settings, tmp_path):
    settings = replace(settings, validation_steps=2, resume_from_checkpoint="latest")
    silent_run(settings).train(stop=lambda step: step == 3)
    shutil.rmtree(tmp_path / "checkpoint-3")
    validated = []
    run = silent_run(settings)
    validate = run.events.validator.run

    def noted(beat):
        validated.append(run.state.step)
        return validate(beat)

    run.events.validator.run = noted
    run.train()
    assert validated == [4] and validations(tmp_path) == [2, 4]


def test_a_score_that_fails_is_said_and_the_training_goes_on(settings, tmp_path):
    said = logged()
    scores = iter([RuntimeError("no such\nextractor"), 1.0])

    def scorer(models, step):
        found = next(scores)
        if isinstance(found, Exception):
            raise found
        return found

    run = prepare(replace(settings, early_stopping=SCORED), scorer)
    assert run.train().step == 4
    assert "warning: step 2: no score (RuntimeError: no such); the training goes on." in said
    assert [row["step"] for row in read_stats(tmp_path) if "score" in row] == [4]


def test_a_full_disk_at_the_best_adapter_is_said_and_no_half_folder_left(settings, tmp_path, monkeypatch):
    save, said = LocalAdapter.save_pretrained, logged()

    def full(self, folder, **options):
        if folder.name == "best":
            (folder / "config.json").write_text("{}")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save(self, folder, **options)

    monkeypatch.setattr(LocalAdapter, "save_pretrained", full)
    run = prepare(replace(settings, early_stopping=SCORED), lambda models, step: float(step))
    assert run.train().step == 4
    assert any("best could not be written to" in line and "No space left" in line for line in said)
    assert not (tmp_path / "best").exists() and not list(tmp_path.glob(".*"))


class Broken(logging.Tracker):
    def log(self, step, values):
        raise RuntimeError("no network\nat all")

    image = close = log


def test_a_tracker_that_fails_is_said_once(settings, tmp_path, monkeypatch):
    said = logged()
    make = logging.BoardTracker
    monkeypatch.setattr(logging, "BoardTracker", raising(OSError("logs is a file")))
    silent_run(replace(settings, report_to="tensorboard")).train()
    assert [line for line in said if "warning:" in line] == [
        "warning: TensorBoard cannot start (logs is a file); the training goes on without it."
    ]
    assert make is not logging.BoardTracker and [row["step"] for row in loss_log(tmp_path)] == [1, 2, 3, 4]
    tracker = Trackers({"wandb": Broken(), "file": logging.FileTracker(tmp_path)})
    tracker.log(5, {"loss": 1.0})
    tracker.log(6, {"loss": 1.0})
    tracker.close()
    assert said[-1] == "warning: wandb recorded nothing at step 5 (no network); the training goes on."
    assert sum("wandb" in line for line in said) == 1 and read_stats(tmp_path)[-1]["step"] == 6


def test_a_row_that_found_no_room_comes_with_the_next(tmp_path, monkeypatch):
    tracker, append = logging.FileTracker(tmp_path), logging.append
    monkeypatch.setattr(logging, "append", raising(OSError("stats.jsonl could not be written: full")))
    with pytest.raises(OSError, match=r"stats.jsonl could not"):
        tracker.log(1, {"loss": 1.0})
    monkeypatch.setattr(logging, "append", append)
    tracker.log(2, {"loss": 2.0})
    tracker.close()
    assert [row["step"] for row in read_stats(tmp_path)] == [1, 2]


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_at_the_export_keeps_the_training_in_a_checkpoint(settings, tmp_path, monkeypatch):
    """Also where checkpoints were off."""
    monkeypatch.setattr(LocalAdapter, "save_t2iadapter", raising(FULL))
    settings = replace(settings, checkpointing_steps=0)
    with pytest.raises(
        OSError, match="adapter and t2iadapter could not .*No space left.*checkpoint-4 holds all"
    ) as error:
        silent_run(settings).train()
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "stats.jsonl", "config.yaml"}
    monkeypatch.undo()
    assert silent_run(replace(settings, resume_from_checkpoint="latest")).train().step == 4
    assert (tmp_path / "t2iadapter" / "config.json").exists()


def test_where_no_checkpoint_fits_either_the_adapter_is_kept_elsewhere(settings, tmp_path, monkeypatch):
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    monkeypatch.setattr(TrainState, "save", raising(CheckpointError("full")))
    monkeypatch.setattr(LocalAdapter, "save_t2iadapter", raising(FULL))
    run = silent_run(replace(settings, checkpointing_steps=0, output_dir=str(tmp_path / "out")))
    with pytest.raises(OSError, match="the adapter alone is saved in") as error:
        run.train()
    kept = LocalAdapter.from_pretrained(str(error.value).partition("saved in ")[2].rstrip("."))
    for name, value in run.state.models.plain_adapter.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name])


def test_a_signal_while_exporting_lets_it_end(settings, tmp_path, monkeypatch):
    save = LocalAdapter.save_t2iadapter

    def signalled(self, folder):
        run.interrupt.ask_to_stop()
        return save(self, folder)

    monkeypatch.setattr(LocalAdapter, "save_t2iadapter", signalled)
    run = silent_run(settings)
    result = run.train()
    assert result.signal == 15 and not result.interrupted and (tmp_path / "README.md").exists()


def test_a_launcher_that_is_gone_ends_it_with_a_checkpoint(settings, tmp_path):
    said = logged()
    result = prepare(settings, parent=1).train()
    assert (result.signal, result.step) == (15, 0) and "before the first step (the process that launched" in said[-1]
    assert not (tmp_path / LOCK).exists()
    run = silent_run(replace(settings, overwrite_output_dir=True))

    def lose(step):
        run.interrupt.launcher = 1 if step == 1 else run.interrupt.launcher
        return False

    assert run.train(lose).signal == 15 and max(list_checkpoints(tmp_path)) == 2


def test_a_killed_worker_leaves_a_checkpoint(settings, tmp_path, monkeypatch):
    """The signal comes in the middle of an accumulation, which then starts again."""
    straight = silent_run(replace(settings, gradient_accumulation_steps=2, output_dir=str(tmp_path / "straight")))
    straight.train()
    settings = replace(settings, gradient_accumulation_steps=2, output_dir=str(tmp_path / "killed"), logging_steps=3)
    monkeypatch.setattr(loop, "next_batch", dying_at(5, loop.next_batch))
    with pytest.raises(WorkerError, match="killed; checkpoint-2 holds all of the training: continue with"):
        silent_run(settings).train()
    monkeypatch.undo()
    run = silent_run(replace(settings, resume_from_checkpoint="latest"))
    assert run.state.step == 2 and run.train().step == 4
    pairs = zip(run.state.models.adapter.parameters(), straight.state.models.adapter.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def dying_at(number, inner):
    seen = []

    def batch(*given):
        seen.append(1)
        if len(seen) == number + 1:
            raise WorkerError("A data worker was killed")
        return inner(*given)

    return batch


def test_a_folder_removed_while_training_is_said_and_the_training_kept(settings, tmp_path):
    out = tmp_path / "out"
    run = silent_run(replace(settings, output_dir=str(out), checkpointing_steps=0))

    def vanish(step):
        if step == 1:
            shutil.rmtree(out)
        return False

    with pytest.raises(OSError, match="was removed while training; it was created again and the training saved there"):
        run.train(vanish)
    assert list(list_checkpoints(out)) == [2] and (out / "config.yaml").exists()
    assert [row["step"] for row in read_stats(out)] == [1, 2]
    verify_checkpoint(out / "checkpoint-2")


def test_a_second_run_in_the_folder_is_refused_before_anything_is_touched(settings, tmp_path, monkeypatch):
    (tmp_path / ".checkpoint-9.tmp").mkdir()
    monkeypatch.setattr("localctl.lock._is_alive", lambda owner: True)
    held = FolderLock(tmp_path)
    with pytest.raises(FolderInUse, match="is in use by process"):
        silent_run(settings)
    assert (tmp_path / ".checkpoint-9.tmp").exists()
    held.release()
    silent_run(settings)
    assert not (tmp_path / ".checkpoint-9.tmp").exists()


def test_a_folder_taken_over_meanwhile_is_not_written_to(settings, tmp_path):
    run = silent_run(replace(settings, checkpointing_steps=0))

    def take(step):
        (tmp_path / LOCK).write_text('{"token": "other", "host": "node7", "pid": 5}')
        return False

    with pytest.raises(OSError, match="taken over by process 5 on node7"):
        run.train(take)
    assert not list_checkpoints(tmp_path)


def watched(masks):
    said = logged()
    watch = DataWatch(Quarantine(None, 10, 0.5), None, 0)
    for number, mask in enumerate(masks):
        example = Example(str(number), torch.zeros(3, 8, 8), torch.zeros(1, 8, 8), "", mask=mask)
        watch._count_empty(collate([example, example]))
    return said, watch.lines()


def test_empty_masks_are_said_early_and_at_the_end():
    empty, full = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    said, lines = watched([empty] * 12)
    assert len(said) == 1 and said[0].startswith("warning: all 8 masks seen so far are empty")
    assert "24 of 24 masks seen were empty" in lines[0]
    assert watched([empty, full] * 6) == ([], ["data        12 of 24 masks seen were empty and controlled nothing"])
    said, lines = watched([full] + [empty] * 9)
    assert said == [] and "18 of 20" in lines[0]


def test_a_card_and_settings_need_no_locale(settings, tmp_path, monkeypatch):
    """Files are written as UTF-8 in any locale, as in a job with LC_ALL=C."""
    text = Path.write_text

    def ascii_only(self, data, encoding=None, errors=None, newline=None):
        return text(self, data, encoding or "ascii", errors, newline)

    monkeypatch.setattr(Path, "write_text", ascii_only)
    base = tmp_path / "基本"
    shutil.copytree(settings.base.name, base)
    out = tmp_path / "out"
    silent_run(replace(settings, base=replace(settings.base, name=str(base)), output_dir=str(out))).train()
    assert "# Local canny adapter for 基本" in (out / "README.md").read_text(encoding="utf-8")
    assert "基本" in (out / "config.yaml").read_text(encoding="utf-8")
