import numpy as np
import pytest

from localctl.metrics.bootstrap import bootstrap


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    samples = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap(samples)
    half = 1.96 * samples.std() / 20
    assert interval.value == pytest.approx(samples.mean())
    assert interval.low == pytest.approx(interval.value - half, abs=0.03)
    assert interval.high == pytest.approx(interval.value + half, abs=0.03)


@pytest.mark.parametrize("count", [1, 37, 900])
def test_means_at_once_are_means_one_by_one(count: int) -> None:
    samples = np.random.default_rng(2).normal(size=count)
    assert bootstrap(samples) == bootstrap(samples, lambda rows: float(rows.mean()))
    rng = np.random.default_rng(0)  # the generator of the committed intervals
    means = [samples[rng.integers(count, size=count)].mean() for _ in range(2000)]
    assert [bootstrap(samples).low, bootstrap(samples).high] == np.quantile(means, [0.025, 0.975]).tolist()


def test_columns_stay_paired() -> None:
    """The difference of two columns that vary together has an interval of width 0, however wide each is alone."""
    base = np.random.default_rng(1).normal(0, 10, 100)
    interval = bootstrap(np.stack([base, base + 1], axis=1), lambda rows: float((rows[:, 1] - rows[:, 0]).mean()))
    assert interval.low == pytest.approx(1) and interval.high == pytest.approx(1)


def test_it_resamples_with_its_own_generator() -> None:
    samples = np.arange(50.0)
    state = np.random.get_state()[1].copy()
    assert bootstrap(samples) == bootstrap(samples)
    assert bootstrap(samples, seed=1) != bootstrap(samples)
    assert np.array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize(("samples", "message"), [([], "no samples"), ([1.0, float("nan")], "1 samples are NaN")])
def test_undefined_input_is_refused(samples: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(np.asarray(samples))
