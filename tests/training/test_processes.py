"""Several processes train like one, stop together, and never wait forever for each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from ddp_worker import GLOBAL_BATCH, settings_for, small_pictures, weights
from log_helpers import logged
from process_helpers import checkpoint_contents, difference, finish, start_ranks, wait_for
from training_helpers import loss_log, silent_run, tiny_settings

from localctl import losses
from localctl.data import PlanSampler, SamplePlan
from localctl.data.bad_rows import Problem, TooManyBadRows
from localctl.data.config import DataConfig
from localctl.distributed import Messages, leave
from localctl.files import sha256_of_json
from localctl.losses import FILTERS
from localctl.training import data as run_data
from localctl.training import loop
from localctl.training.checkpoints import list_checkpoints
from localctl.training.data import DataWatch, next_batch, shared_quarantine
from localctl.training.state import WAIT
from localctl.training.trackers import read_stats


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(run_data, "make_source", small_pictures)


def furthest(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def check_same_rows(first, second):
    for a, b in zip(first, second, strict=True):
        for name in ("step", "loss", "denoising", "local", "learning_rate"):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), (name, a["step"])


@pytest.mark.slow
def test_two_processes_are_one(sd_folder, tmp_path, small):
    """Every loss, 32 updates; the first run also validates and saves with both processes."""
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    paths = os.pathsep.join([str(Path(loop.__file__).parents[2]), str(worker.parents[1] / "helpers")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    result = subprocess.run(
        [*command, str(sd_folder), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in FILTERS:
        alone = silent_run(settings_for(sd_folder, tmp_path / f"{name}-alone", name, 1))
        alone.train()
        together = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert furthest(weights(alone), together) < 1e-6, name
        check_same_rows(loss_log(tmp_path / name), loss_log(tmp_path / f"{name}-alone"))
    rows = read_stats(tmp_path / "none")
    assert [row["step"] for row in rows if "validation/f1" in row] == [16, 32]
    assert list(list_checkpoints(tmp_path / "none")) == [24, 32]


def two_small_steps(base, folder, stop_after=None):
    """One of two processes; ``stop_after``: the process with rank 1 is sent SIGTERM then."""
    run_data.make_source = small_pictures

    def stop(step):
        if stop_after == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    settings = settings_for(
        base, folder, "sobel", 2, max_train_steps=6, logging_steps=4, resume_from_checkpoint="latest",
        validation_steps=3, checkpointing_steps=6,
    )  # fmt: skip
    run = silent_run(settings)
    assert run.state.accelerator.num_processes == 2
    result = run.train(stop)
    leave()
    return 128 + result.signal if result.signal else 0


def test_two_processes_stop_together_at_a_signal_to_one_and_go_on_exactly(sd_folder, tmp_path, small):
    """The signal comes in the middle of a logging period: the terms of both processes go through the checkpoint."""
    straight = start_ranks(2, two_small_steps, sd_folder, tmp_path / "straight")
    assert [finish(process) for process in straight] == [0, 0]
    stopped = start_ranks(2, two_small_steps, sd_folder, tmp_path / "stopped", 1)
    assert [finish(process) for process in stopped] == [143, 143]
    assert list(list_checkpoints(tmp_path / "stopped")) == [2]
    resumed = start_ranks(2, two_small_steps, sd_folder, tmp_path / "stopped")
    assert [finish(process) for process in resumed] == [0, 0]
    assert loss_log(tmp_path / "stopped") == loss_log(tmp_path / "straight")
    ends = [checkpoint_contents(tmp_path / name / "checkpoint-6") for name in ("stopped", "straight")]
    assert difference(*ends) == []

    alone = settings_for(sd_folder, tmp_path / "stopped", "sobel", 1, max_train_steps=8, logging_steps=4)
    said = logged()
    with pytest.raises(ValueError, match="processes: 2 -> 1") as refused:
        silent_run(replace(alone, resume_from_checkpoint="latest"))
    assert "train_batch_size: 2 -> 4" in str(refused.value) and "sobel" not in str(refused.value)
    forced = silent_run(replace(alone, resume_from_checkpoint="latest", force_resume=True))
    assert forced.state.step == 6 and any("processes: 2 -> 1" in line for line in said)


def long_validation(base, folder):
    run_data.make_source = small_pictures
    settings = settings_for(base, folder, "none", 2, max_train_steps=2, validation_steps=1, logging_steps=1)
    settings = replace(settings, validation=replace(settings.validation, num_inference_steps=900))
    return 128 + silent_run(settings).train().signal


def test_a_signal_to_one_is_heard_while_the_other_validates(sd_folder, tmp_path):
    ranks = start_ranks(2, long_validation, sd_folder, tmp_path)
    wait_for(lambda: (tmp_path / "stats.jsonl").exists() and read_stats(tmp_path), ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [finish(process, 30) for process in ranks] == [143, 143]
    assert list(list_checkpoints(tmp_path)) == [1]


def nan_on_one(base, folder):
    run_data.make_source = small_pictures
    sample_noise = loop.sample_noise

    def poisoned(batch, *more):
        made = sample_noise(batch, *more)
        if os.environ["RANK"] == "1":
            made.noise[1] = torch.nan
        return made

    loop.sample_noise = poisoned
    run = silent_run(settings_for(base, folder, "none", 2, max_train_steps=2))
    before = weights(run)
    try:
        run.train()
    except loop.NotFiniteError as error:
        assert furthest(before, weights(run)) == 0
        (folder / f"said-{os.environ['RANK']}").write_text(str(error))
        return 5
    return 0


def test_nan_on_one_process_stops_both_and_names_its_sample(sd_folder, tmp_path):
    assert [finish(process) for process in start_ranks(2, nan_on_one, sd_folder, tmp_path)] == [5, 5]
    texts = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    culprit = "picture-" + str(SamplePlan(10, 0).at(3).sample)
    assert texts[0] == texts[1] and f"step 1 (samples {culprit})" in texts[0]


def own_folder(base, folder):
    run_data.make_source = small_pictures
    """The same settings, with a folder on the disk of each machine."""
    os.makedirs(folder / os.environ["RANK"], exist_ok=True)
    os.chdir(folder / os.environ["RANK"])
    settings = settings_for(base, Path("run"), "none", 2, resume_from_checkpoint="latest")
    try:
        silent_run(settings)
    except ValueError as error:
        return 7 if "different checkpoints" in str(error) else 0
    return 0


def test_processes_that_find_different_checkpoints_do_not_start(sd_folder, tmp_path, small):
    settings = settings_for(sd_folder, tmp_path / "0" / "run", "none", 2, max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    manifest = tmp_path / "0" / "run" / "checkpoint-1" / "manifest.json"
    body = json.loads(manifest.read_text())
    body["info"]["world_size"] = 2
    body["sha256"] = sha256_of_json({name: body[name] for name in ("step", "files", "info")})
    manifest.write_text(json.dumps(body))
    assert [finish(process) for process in start_ranks(2, own_folder, sd_folder, tmp_path)] == [7, 7]


def accumulated(base, folder, batch, times, updates):
    """Groups of 8 of 10 samples: all but the first of an epoch's groups reach into the next one."""
    run = silent_run(
        settings_for(
            base,
            folder,
            "sobel",
            1,
            train_batch_size=batch,
            gradient_accumulation_steps=times,
            max_train_steps=updates,
            logging_steps=1,
        )
    )
    run.train()
    return run


def test_accumulation_is_a_larger_batch_also_over_the_end_of_an_epoch(sd_folder, tmp_path, small):
    one = accumulated(sd_folder, tmp_path / "8", 8, 1, 8)
    two = accumulated(sd_folder, tmp_path / "4x2", 4, 2, 8)
    assert furthest(weights(one), weights(two)) < 1e-6
    check_same_rows(loss_log(tmp_path / "8"), loss_log(tmp_path / "4x2"))


def test_gradients_of_accumulation_are_those_of_the_batch_at_any_rate(sd_folder, tmp_path, small, monkeypatch):
    """Adam's updates may differ more: it divides gradients that are only rounding errors by their own size."""
    step, found = AcceleratedOptimizer.step, []

    def looked_at(self):
        found.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self)

    monkeypatch.setattr(AcceleratedOptimizer, "step", looked_at)
    for batch, times in ((8, 1), (4, 2)):
        accumulated(sd_folder, tmp_path / str(times), batch, times, 1)
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() <= 1e-5 * one.abs().max()


def test_losses_stay_together_at_a_high_rate_with_a_short_warm_up(sd_folder, tmp_path, small):
    high = {"learning_rate": 3e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "logging_steps": 1}
    rows, ends = [], []
    for batch, times in ((8, 1), (4, 2)):
        options = {**high, "train_batch_size": batch, "gradient_accumulation_steps": times, "max_train_steps": 8}
        run = silent_run(settings_for(sd_folder, tmp_path / str(times), "sobel", 1, **options))
        run.train()
        rows.append(loss_log(tmp_path / str(times)))
        ends.append(weights(run))
    assert furthest(*ends) <= 2 * sum(row["learning_rate"] for row in rows[0])
    for one, two in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_a_mean_over_the_whole_batch_would_be_seen(sd_folder, tmp_path, small, monkeypatch):
    """The tests above detect masks normalised by the area in the batch: 4 x 2 samples then differ from 8."""

    def over_the_batch(error, mask, normalise):
        return ((error * mask).mean(dim=1).sum() / mask.sum()).expand(len(error))

    monkeypatch.setattr(losses, "masked_mean", over_the_batch)
    rows = [
        loss_log(tmp_path / str(times))[0]["loss"]
        for times in (1, 2)
        if accumulated(sd_folder, tmp_path / str(times), 8 // times, times, 1)
    ]
    assert abs(rows[0] - rows[1]) > 1e-4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_order_is_elastic(accumulation):
    """1, 2 and 4 processes with the same global batch see the same samples in each step, no sample in two of them."""
    plan, steps = SamplePlan(22, 3), 11
    unions = []
    for world in (1, 2, 4):
        ranks = [
            list(
                PlanSampler(
                    plan, GLOBAL_BATCH * 2 // world, 0, steps, accumulation=accumulation, rank=rank, world_size=world
                )
            )
            for rank in range(world)
        ]
        assert all(len(rank) == steps * accumulation for rank in ranks)
        by_step = [
            [ref for rank in ranks for micro in rank[step * accumulation : (step + 1) * accumulation] for ref in micro]
            for step in range(steps)
        ]
        assert all(len(set(refs)) == len(refs) for refs in by_step)
        unions.append([sorted(refs) for refs in by_step])
    assert unions[0] == unions[1] == unions[2]
    visits = [ref for step in unions[0] for ref in step]
    whole = len(visits) // plan.count
    for epoch in range(whole):
        assert sorted(ref.sample for ref in visits if ref.epoch == epoch) == list(range(plan.count))
    orders = [[plan.at(epoch * plan.count + i).sample for i in range(plan.count)] for epoch in range(whole)]
    assert orders[0] != orders[1]


def test_a_step_is_never_short(sd_folder, tmp_path):
    """There is no incomplete group: the stream goes on into the next epoch, also where an epoch holds less than one."""
    plan = SamplePlan(3, 0)
    batches = list(PlanSampler(plan, 4, 0, 6, accumulation=2))
    assert {len(batch) for batch in batches} == {4} and len(batches) == 12
    assert [ref for batch in batches for ref in batch] == [plan.at(i) for i in range(48)]
    settings = tiny_settings(sd_folder, tmp_path, train_batch_size=4, gradient_accumulation_steps=2, max_train_steps=1)
    run = silent_run(replace(settings, data=replace(settings.data, count=3)))
    assert run.train().step == 1


class OneBatch(list):
    """Of the keys in it, with the problems met on the way."""

    problems: tuple[Problem, ...] = ()


def watched_batches(folder, usable):
    """Rank 1 meets a bad row in step 1 and two more in step 2 (of 10 rows, a fifth may be bad), or no usable one."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    watch = DataWatch(shared_quarantine(accelerator, folder, 10, 0.2, start=0), None, 0)
    state = SimpleNamespace(accelerator=accelerator, agree=Messages(WAIT).largest)
    bad = [Problem(f"row-{i}", "damaged", "it is damaged") for i in range(3)]
    try:
        for step, problems in enumerate((bad[:1], bad[1:]), start=1):
            other = accelerator.process_index == 1
            batch = OneBatch(["row-9"] if usable or not other else [])
            batch.problems = tuple(problems) if other else ()
            state.step = step - 1
            next_batch(iter([batch]), state, watch)
    except TooManyBadRows as error:
        (folder / f"said-{accelerator.process_index}").write_text(f"step {step}: {error}")
        return 5
    return 0


@pytest.mark.parametrize("usable", [True, False])
def test_bad_rows_met_by_one_process_stop_both_at_the_same_step(tmp_path, usable):
    assert [finish(process) for process in start_ranks(2, watched_batches, tmp_path, usable)] == [5, 5]
    texts = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    expected = "step 2: 3 of 10 rows" if usable else "step 1: No usable row"
    assert all(text.startswith(expected) and "row-0" in text for text in texts)


def resumed_watch(folder):
    accelerator = Accelerator(cpu=True)
    return len(shared_quarantine(accelerator, folder, 10, DataConfig().max_bad_fraction, start=3).problems)


def test_after_a_resume_all_processes_know_the_bad_rows(tmp_path):
    lines = [{"step": s, "key": f"row-{s}", "reason": "damaged", "detail": "it is damaged"} for s in (2, 3, 4)]
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [finish(process) for process in start_ranks(2, resumed_watch, tmp_path)] == [2, 2]
