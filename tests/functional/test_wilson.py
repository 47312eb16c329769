import numpy as np
import pytest
from scipy import stats

from hf_aegis.functional.wilson import wilson_interval


@pytest.mark.parametrize("trials", [1, 2, 10, 50, 500])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_it_is_scipys(trials, level):
    for successes in {0, 1, trials // 3, trials // 2, trials - 1, trials}:
        expected = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
        assert wilson_interval(successes, trials, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_published_example():
    # Newcombe (1998, Statistics in Medicine 17:857-872), table I, method 3: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_certain_outcomes_end_at_the_bounds():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


def test_it_covers_about_as_often_as_it_says():
    trials, probability = 50, 0.3
    covered = sum(
        stats.binom.pmf(k, trials, probability)
        for k in range(trials + 1)
        if wilson_interval(k, trials)[0] <= probability <= wilson_interval(k, trials)[1]
    )
    assert 0.93 < covered < 0.97


def test_failures_mirror_successes():
    intervals = np.array([wilson_interval(k, 12) for k in range(13)])
    np.testing.assert_allclose(intervals, 1 - intervals[::-1, ::-1], atol=1e-12)


@pytest.mark.parametrize(("successes", "trials", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_what_is_out_of_range_is_refused(successes, trials, level):
    with pytest.raises(ValueError, match="found"):
        wilson_interval(successes, trials, level)
