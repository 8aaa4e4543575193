"""The score of early stopping from the command line: its value, no side effects, and the same after a resume."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scorer_worker
import torch
from log_helpers import logged

from localctl.cli import evaluate_fid
from localctl.cli import train as train_adapter
from localctl.cli.config import load_config
from localctl.data import DataConfig
from localctl.evaluation import scorer as scorer_module
from localctl.evaluation.scorer import METRICS, make_scorer
from localctl.metrics.distances import frechet_distance
from localctl.metrics.statistics import Statistics
from localctl.pipelines import BaseConfig
from localctl.training.loop import prepare
from localctl.training.settings import ALIASES, FREE_GROUPS, EarlyStoppingConfig, TrainSettings, ValidationConfig
from localctl.training.state import EarlyStopping
from localctl.training.trackers import read_stats

CONFIG = EarlyStoppingConfig(
    every=2, patience=2, metric="frechet_micro_clip", num_images=5, batch_size=2, num_inference_steps=1
)


def settings_of(base, folder, **changes):
    options = {
        "base": BaseConfig(name=str(base)),
        "data": DataConfig(count=6),
        "validation": ValidationConfig(count=2, num_inference_steps=1),
        "output_dir": str(folder),
        "max_train_steps": 5,
        "train_batch_size": 2,
        "lr_warmup_steps": 0,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "validation_steps": 0,
        "checkpointing_steps": 5,
        "report_to": "none",
        "early_stopping": CONFIG,
    }
    return TrainSettings(**(options | changes))


def scores(folder):
    return [(row["step"], row["score"]) for row in read_stats(folder) if "score" in row]


def test_scores_are_the_same_after_a_resume(sd_folder, tmp_path):
    settings = settings_of(sd_folder, tmp_path / "whole")
    said = logged()
    assert prepare(settings, scorer=make_scorer(settings)).train().step == 5
    whole = scores(tmp_path / "whole")
    assert [step for step, _ in whole] == [2, 4] and whole[0][1] != whole[1][1] and min(s for _, s in whole) > 0
    assert (tmp_path / "whole" / "best" / "config.json").exists() and "until frechet_micro_clip" in said[0]
    cut = replace(settings, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="latest")
    prepare(cut, scorer=make_scorer(cut)).train(stop=lambda step: step == 3)
    prepare(cut, scorer=make_scorer(cut)).train()
    assert scores(tmp_path / "cut") == whole


def test_a_score_is_the_distance_of_the_generated_images_and_changes_nothing(sd_folder, tmp_path, monkeypatch):
    settings = settings_of(sd_folder, tmp_path, early_stopping=replace(CONFIG, scheduler="euler"))
    run = prepare(settings)
    models, scorer = run.state.models, make_scorer(settings)
    before = [p.detach().clone() for p in models.plain_adapter.parameters()]
    scheduler, random = models.pipe.scheduler, torch.random.get_rng_state()
    kept: list = []
    extract = scorer.extractor.__class__.__call__
    monkeypatch.setattr(
        scorer.extractor.__class__, "__call__", lambda self, x: kept.append(np.asarray(x)) or extract(self, x)
    )
    first = scorer(models, 2)
    assert scorer(models, 4) == first
    assert models.pipe.scheduler is scheduler and torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(models.plain_adapter.parameters(), before, strict=True))
    photos, generated = np.concatenate(kept[:3]), np.concatenate(kept[3:6])
    assert len(photos) == len(generated) == 5 and not np.array_equal(photos, generated)
    assert all(np.array_equal(a, b) for a, b in zip(kept[3:6], kept[6:], strict=True))  # the photos are measured once

    def gaussian(images):
        features = extract(scorer.extractor, images).double().numpy()
        return features.mean(0), np.cov(features, rowvar=False)

    assert first == pytest.approx(frechet_distance(*gaussian(photos), *gaussian(generated)), rel=1e-6)
    with torch.no_grad():
        for parameter in models.plain_adapter.parameters():
            parameter.mul_(5)
    assert scorer(models, 6) != first


def test_from_the_command_line_with_a_reference(sd_folder, tmp_path, capsys):
    fid = tmp_path / "fid"
    assert evaluate_fid.main(["ref", f"base={sd_folder}", "part=val", "num_images=6", f"output_dir={fid}"]) == 0
    reference = fid / "ref_micro_clip.npz"
    argv = [
        f"base={sd_folder}", f"output_dir={tmp_path / 'run'}", "data.count=4", "train_batch_size=2",
        "--max_train_steps", "1", "validation_steps=0", "early_stopping.every=1", "report_to=none",
        "early_stopping.metric=frechet_micro_clip", "early_stopping.num_images=3", "checkpointing_steps=0",
        "early_stopping.num_inference_steps=1",
    ]  # fmt: skip
    assert train_adapter.main([*argv, f"early_stopping.reference={reference}"]) == 0
    assert len(scores(tmp_path / "run")) == 1
    capsys.readouterr()
    other, large = tmp_path / "other.npz", tmp_path / "large.npz"
    made = Statistics.load(reference)
    Statistics(made.counts, made.sums, made.products, made.kept, {**made.provenance, "extractor": "fid"}).save(other)
    size = {**made.provenance, "image_size": [512, 512]}
    Statistics(made.counts, made.sums, made.products, made.kept, size).save(large)
    cases = {
        f"early_stopping.reference={tmp_path / 'nowhere.npz'}": ("no statistics", "nowhere.npz"),
        f"early_stopping.reference={other}": ("another extractor",),
        f"early_stopping.reference={large}": ("another image_size",),
        "early_stopping.metric=frechet_incepton": ("frechet_incepton", "frechet_micro_clip"),
        "early_stopping.metric=frechet_clip": ("needs weights",),
        f"early_stopping.weights={tmp_path}": ("no CLIP",),
        "early_stopping.lower_is_better=false": ("is a distance",),
    }
    for flag, words in cases.items():
        assert train_adapter.main([*argv, flag, f"output_dir={tmp_path / 'none'}"]) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words) and error.count("\n") == 1, error
    assert not (tmp_path / "none").exists()


def test_the_recipe_stops_by_fid_or_says_what_is_missing(tmp_path, monkeypatch):
    argv = ["experiment=paper_canny", "data=micro", "data.resolution=null", "output_dir=" + str(tmp_path)]
    settings = load_config(argv, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS)
    assert settings.early_stopping.metric == "fid" and settings.early_stopping.num_images == 2048
    asked: list = []
    with monkeypatch.context() as patch:
        patch.setattr(scorer_module, "load_extractor", lambda *args: asked.append(args[:2]))
        assert make_scorer(settings) is not None and asked == [("fid", None)]
    monkeypatch.setattr("localctl.metrics.extractors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'fid' needs a package.*localctl\[fid\].*--early_stopping.every 0"):
        make_scorer(settings)
    off = replace(settings, early_stopping=replace(settings.early_stopping, every=0))
    assert make_scorer(off) is None
    assert make_scorer(replace(settings, early_stopping=EarlyStoppingConfig(every=3))) is None
    assert set(METRICS) == {"fid", "frechet_micro_clip", "frechet_efficientnet_lite0", "frechet_clip"}


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree_with_one(tmp_path):
    one, batches = scorer_worker.statistics()
    assert batches == 4 and one.n == 6
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    worker = [scorer_worker.__file__, str(tmp_path / "two.npz")]
    subprocess.run([*command, *worker], cwd=root, env=environment, check=True, timeout=300)
    assert (tmp_path / "two.txt").read_text() == "2 2"
    two = Statistics.load(tmp_path / "two.npz")
    for name in ("counts", "sums", "products", "kept"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_the_best_under_another_metric_is_forgotten():
    stopping = EarlyStopping(EarlyStoppingConfig(every=1, metric="fid"))
    stopping.update(3, 1.5)
    state = json.loads(json.dumps(stopping.state_dict()))
    same, other = (EarlyStopping(EarlyStoppingConfig(every=1, metric=m)) for m in ("fid", "frechet_micro_clip"))
    same.load_state_dict(state)
    other.load_state_dict(state)
    assert same == stopping and (other.best, other.worse, other.last_step) == (None, 0, 3)
