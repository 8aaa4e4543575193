import json
from dataclasses import replace

import pytest
import torch

from localctl.losses import LossTerms
from localctl.training.step import StepOutput, StepStats, bucket_means


def output(timesteps, scale=1.0):
    t = torch.tensor(timesteps)
    values = t.float() / 1000 * scale
    features = torch.stack([values, 2 * values], dim=1)
    return StepOutput(values.mean(), LossTerms(values, values / 8, values * 2, values), t, features, features + 1)


def row(stats):
    return stats.row(1000, lambda tensor: tensor)


def test_a_row_is_the_mean_over_samples_by_tenth_of_the_timesteps():
    stats = StepStats()
    stats.add(output([0, 99, 500]))
    stats.add(output([999]))
    stats.add_time(4, seconds=2.0, waiting=0.5)
    values = row(stats)
    assert values["denoising"] == pytest.approx((0 + 0.099 + 0.5 + 0.999) / 4)
    assert values["loss"] == pytest.approx(values["denoising"] * 1.125)
    assert values["local_raw_by_timestep"][0] == pytest.approx(0.099)
    assert values["denoising_by_timestep"][9] == pytest.approx(0.999)
    assert values["local_raw_by_timestep"][1] is None and len(values["local_raw_by_timestep"]) == 10
    assert values["images_per_second"] == 2 and values["data_wait_share"] == 0.25


def test_features_by_level_are_those_of_all_samples_together():
    features = torch.randn(7, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    features[:, 1] *= 5
    stats = StepStats()
    for part in (features[:3], features[3:]):
        var, mean = torch.var_mean(part, dim=2, correction=0)
        stats.add(replace(output([0] * len(part)), feature_mean=mean, feature_var=var))
    values, together = row(stats), features.transpose(0, 1).flatten(1)
    assert values["feature_mean_by_level"] == pytest.approx(together.mean(dim=1).tolist())
    assert values["feature_std_by_level"] == pytest.approx(together.std(dim=1, correction=0).tolist())


def test_what_an_earlier_version_gathered_is_left_out():
    stats = StepStats()
    stats.add(output([3, 700]))
    state = stats.state_dict()
    for name in ("feature_mean", "feature_var"):
        del state["terms"][name]
    restored = StepStats.from_state_dict(state)
    restored.add(output([100]))
    assert row(restored)["denoising"] == pytest.approx(0.1)


def test_after_a_row_it_starts_anew():
    stats = StepStats()
    stats.add(output([0]))
    row(stats)
    stats.add(output([500]))
    assert row(stats)["denoising"] == pytest.approx(0.5)


def test_saved_and_restored_exactly_also_when_empty():
    one, two = StepStats(), StepStats()
    for stats in (one, two):
        stats.add(output([3, 700], scale=1 / 3))
    two = StepStats.from_state_dict(json.loads(json.dumps(two.state_dict())))
    for stats in (one, two):
        stats.add(output([100], scale=1 / 7))
    assert row(one) == row(two)
    empty = StepStats.from_state_dict(StepStats().state_dict())
    empty.add(output([1]))
    assert row(empty)["loss"] > 0


def test_restored_terms_lie_where_the_coming_ones_will():
    """Otherwise, a row that started before a resume could not be concatenated on a GPU."""
    stats = StepStats()
    stats.add(output([3, 700]))
    restored = StepStats.from_state_dict(stats.state_dict(), "meta")
    assert {part.device.type for parts in restored.terms.values() for part in parts} == {"meta"}


def test_bucket_means_are_exact_at_the_borders():
    timesteps = torch.tensor([0, 24, 25, 249])
    means = bucket_means(torch.tensor([1.0, 2.0, 4.0, 8.0]), timesteps * 10 // 250)
    assert means[0] == 1.5 and means[1] == 4.0 and means[9] == 8.0
