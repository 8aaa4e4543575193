import json
import math
from dataclasses import replace

import pytest
import torch
from log_helpers import logged
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.adapter import LocalAdapter
from localctl.training.settings import EarlyStoppingConfig
from localctl.training.state import EarlyStopping
from localctl.training.trackers import read_stats


def fed(config, scores):
    stopping = EarlyStopping(config)
    best = [stopping.update(config.every * (i + 1), score) for i, score in enumerate(scores)]
    return stopping, best


def test_patience_counts_scores_since_the_best():
    config = EarlyStoppingConfig(every=10, patience=2)
    stopping, best = fed(config, [30.0, 20.0, 25.0])
    assert best == [True, True, False] and not stopping.stopped
    assert (stopping.best, stopping.best_step, stopping.worse) == (20.0, 20, 1)
    assert fed(config, [30.0, 20.0, 25.0, 20.0])[0].stopped
    assert not fed(config, [30.0, 20.0, 25.0, 19.0, 21.0])[0].stopped


def test_higher_may_be_better_and_a_gain_may_be_too_small():
    config = EarlyStoppingConfig(every=1, patience=1, lower_is_better=False, min_delta=0.5)
    assert fed(config, [1.0, 2.0])[1] == [True, True]
    assert fed(config, [1.0, 1.5])[0].stopped and fed(config, [1.0, 0.0])[0].stopped


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_the_best(bad):
    stopping, best = fed(EarlyStoppingConfig(every=1, patience=2), [bad, 1.0, bad])
    assert best == [False, True, False] and stopping.best == 1.0 and stopping.worse == 1


def test_a_score_is_due_once():
    stopping = EarlyStopping(EarlyStoppingConfig(every=5))
    assert [step for step in range(12) if stopping.due(step)] == [5, 10]
    stopping.update(5, 1.0)
    assert not stopping.due(5) and stopping.due(10)
    off = EarlyStopping(EarlyStoppingConfig())
    assert not any(off.due(step) for step in range(12)) and not off.stopped


def test_the_state_goes_through_json():
    stopping, _ = fed(EarlyStoppingConfig(every=1, patience=3), [3.0, 4.0])
    again = EarlyStopping(stopping.config)
    again.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
    assert again == stopping


@pytest.mark.parametrize(("name", "value"), [("every", -1), ("patience", 0), ("min_delta", -0.1)])
def test_settings_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=f"early_stopping.{name}"):
        EarlyStoppingConfig(**{name: value})


class Scores:
    """A scorer that takes its scores from a list, by step, and records its calls."""

    def __init__(self, scores):
        self.scores, self.seen = scores, {}

    def __call__(self, models, step):
        self.seen[step] = [p.detach().clone() for p in models.plain_adapter.parameters()]
        return self.scores[step]


def run_with(settings, scorer):
    from localctl.training.loop import prepare

    return prepare(settings, scorer=scorer)


def test_training_stops_keeps_the_best_and_goes_on_exactly(sd_folder, tmp_path):
    settings = tiny_settings(
        sd_folder,
        tmp_path / "whole",
        max_train_steps=9,
        train_batch_size=2,
        checkpointing_steps=9,
        early_stopping=EarlyStoppingConfig(every=2, patience=2),
    )
    scores = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5}
    whole, said = Scores(scores), logged()
    result = run_with(settings, whole).train()
    assert result.step == 8 and not result.interrupted and "stopping, no score since step 4" in "\n".join(said)
    assert (tmp_path / "whole" / "checkpoint-8").is_dir()
    best = LocalAdapter.from_pretrained(tmp_path / "whole" / "best")
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), whole.seen[4], strict=True))
    rows = [row for row in read_stats(tmp_path / "whole") if "score" in row]
    assert [(row["step"], row["score"], row["score/best"]) for row in rows] == [
        (2, 5.0, 5.0), (4, 3.0, 3.0), (6, 4.0, 3.0), (8, 3.5, 3.0),
    ]  # fmt: skip

    cut = replace(settings, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="latest")
    parts = Scores(scores)
    run_with(cut, parts).train(stop=lambda step: step == 6)  # a score is due at 6, and taken after the resume
    assert run_with(cut, parts).train().step == 8
    assert list(parts.seen) == [2, 4, 6, 8]
    assert loss_log(tmp_path / "cut") == loss_log(tmp_path / "whole")


def test_without_a_scorer_the_run_says_that_it_will_not_stop(sd_folder, tmp_path):
    said = logged()
    settings = tiny_settings(sd_folder, tmp_path, max_train_steps=2, early_stopping=EarlyStoppingConfig(every=1))
    assert silent_run(settings).train().step == 2
    assert "early stopping is off" in "\n".join(said)
