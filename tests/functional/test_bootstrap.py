import numpy as np
import pytest
from scipy import stats

from hf_aegis.functional import bootstrap
from hf_aegis.functional.bootstrap import bootstrap_interval


def test_two_values_have_their_known_resamples():
    # Means of two draws from {0, 1}: 0 and 1 with probability 1/4 each, 1/2 with 1/2.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)
    assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)


def test_it_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    samples = generator.exponential(2.0, size=(300, 60))
    intervals = np.array([bootstrap_interval(sample, resamples=400, seed=i) for i, sample in enumerate(samples)])
    covered = ((intervals[:, 0] <= 2.0) & (intervals[:, 1] >= 2.0)).mean()
    # Percentile intervals of a skewed distribution cover slightly less than they say.
    assert 0.89 < covered < 0.97


def test_it_agrees_with_scipy():
    values = np.random.default_rng(1).normal(size=200)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert bootstrap_interval(values, resamples=20_000) == pytest.approx(tuple(expected), abs=0.01)


def test_it_is_seeded_and_wider_at_a_higher_level(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(list(values)) != bootstrap_interval(values, seed=1)
    wider = bootstrap_interval(values, level=0.99)
    assert wider[0] < low < values.mean() < high < wider[1]
    monkeypatch.setattr(bootstrap, "_CHUNK", 170)
    assert bootstrap_interval(values) == pytest.approx((low, high), abs=0.05)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, r"N at least 1; found shape \(0,\)"),
        ([[1.0]], {}, r"found shape \(1, 1\)"),
        ([float("nan")], {}, "must be finite"),
        ([1.0], {"level": 1.0}, "level must lie between 0 and 1; found 1.0"),
        ([1.0], {"resamples": 0}, "resamples must be at least 1; found 0"),
    ],
)
def test_bad_arguments_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)
