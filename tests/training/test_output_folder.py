"""Output folders that are not empty when a run starts: an earlier run, or other files."""

from dataclasses import replace
from pathlib import Path

import pytest
from log_helpers import logged
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.lock import LOCK
from localctl.training.checkpoints import list_checkpoints
from localctl.training.settings import DataConfig


@pytest.fixture
def small(sd_folder, tmp_path):
    """Settings of a short run."""
    return tiny_settings(sd_folder, tmp_path, data=DataConfig(count=3), train_batch_size=2)


def test_an_earlier_run_is_not_mixed_up(small, tmp_path):
    settings = replace(small, output_dir=str(tmp_path), max_train_steps=2, checkpointing_steps=1)
    silent_run(settings).train()
    with pytest.raises(ValueError, match="earlier run.*--resume_from_checkpoint"):
        silent_run(settings)
    (tmp_path / "mine.txt").write_text("kept")
    run = silent_run(replace(settings, overwrite_output_dir=True, max_train_steps=1))
    assert not list_checkpoints(tmp_path) and (tmp_path / "mine.txt").exists()
    run.train()
    assert list(list_checkpoints(tmp_path)) == [1] and [r["step"] for r in loss_log(tmp_path)] == [1]


def test_a_run_without_a_checkpoint_is_not_said_to_be_resumable(small, tmp_path):
    (tmp_path / "stats.jsonl").write_text("")
    (tmp_path / "adapter").mkdir()
    for request in (None, "latest"):
        settings = replace(small, output_dir=str(tmp_path), resume_from_checkpoint=request)
        with pytest.raises(ValueError, match="without a checkpoint; choose another --output_dir"):
            silent_run(settings)


def test_a_run_stopped_before_its_first_checkpoint_starts_afresh_with_latest(small, tmp_path):
    (tmp_path / "stats.jsonl").write_text('{"step": 1}\n')
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    said = logged()
    run = silent_run(replace(small, output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    assert run.state.step == 0 and "from the beginning" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]  # which the run keeps until it ends


@pytest.mark.parametrize("overwrite", [True, False])
def test_files_that_are_not_ours_are_never_touched(small, tmp_path, overwrite):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="README.md"):
        silent_run(replace(small, output_dir=str(tmp_path), overwrite_output_dir=overwrite))
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["stats.jsonl", "config.yaml", "README.md", "quarantine.jsonl", "adapter", "best"])
def test_a_link_to_nowhere_is_not_followed(small, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "planted")
    with pytest.raises(ValueError, match=f"holds {name}, which is not from a training run"):
        silent_run(replace(small, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "planted").exists() and [p.name for p in (tmp_path / "out").iterdir()] == [name]


def test_replacing_a_run_takes_links_as_links(small, tmp_path):
    settings = replace(small, output_dir=str(tmp_path / "out"), max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log").write_text("mine")
    (tmp_path / "out" / "logs").symlink_to(tmp_path / "mine")
    run = silent_run(replace(settings, overwrite_output_dir=True))
    assert [p.name for p in (tmp_path / "out").iterdir()] == [LOCK] and (tmp_path / "mine" / "log").exists()
    run.train()


def test_nothing_of_a_run_is_removed_before_all_of_it_can_be(small, tmp_path, monkeypatch):
    settings = replace(small, output_dir=str(tmp_path), max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    before, rename = sorted(p.name for p in tmp_path.iterdir()), Path.rename

    def stuck(self, target):
        if self.name == "config.yaml":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(OSError, match="config.yaml cannot be removed .*; nothing was"):
        silent_run(replace(settings, overwrite_output_dir=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
