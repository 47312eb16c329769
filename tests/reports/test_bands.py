import numpy as np
import pytest

from hf_aegis.reports.bands import band, series, smooth


def run(values, key="loss"):
    return [{"step": step, key: value} for step, value in values.items()]


def test_the_last_record_of_a_step_counts():
    # The evaluation after training repeats the last step's.
    steps, values = series([*run({1: 5.0, 2: 3.0}), {"step": 2, "other": 1}, {"step": 2, "loss": 4.0}], "loss")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [5.0, 4.0]


def test_a_band_holds_all_runs_around_their_mean():
    found = band([run({0: 1.0, 5: 2.0}), run({0: 2.0, 5: 2.0}), run({0: 6.0, 5: 2.0})], "loss")
    assert found.steps.tolist() == [0, 5]
    assert found.mean.tolist() == [3.0, 2.0]
    assert (found.low.tolist(), found.high.tolist()) == ([1.0, 2.0], [6.0, 2.0])
    alone = band([run({0: 1.0})], "loss")
    assert alone.mean == alone.low == alone.high == 1.0


def test_only_steps_of_all_runs_are_averaged():
    # A mean over fewer runs would jump where one of them ends.
    found = band([run({0: 1.0, 5: 1.0, 9: 1.0}), run({0: 3.0, 9: 3.0}), [{"step": 0, "other": 1}]], "loss")
    assert found.steps.tolist() == [0, 9]
    assert found.mean.tolist() == [2.0, 2.0]
    assert all(len(values) == 0 for values in band([[], [{"step": 0}]], "loss"))


def test_what_was_not_finite_is_a_gap():
    found = band([run({0: 1.0, 1: None, 2: 3.0})], "loss")
    assert np.isnan(found.mean).tolist() == [False, True, False]


def test_smoothing_is_a_centred_mean_that_keeps_ends_and_constants():
    values = np.asarray([0.0, 3.0, 6.0, 9.0, 30.0])
    assert smooth(values, 3).tolist() == [1.5, 3.0, 6.0, 15.0, 19.5]
    assert smooth(values, 1).tolist() == values.tolist()
    assert smooth(np.full(7, 2.0), 5).tolist() == [2.0] * 7
    with_gap = smooth(np.asarray([1.0, np.nan, 3.0]), 3)
    assert with_gap.tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(smooth(np.asarray([np.nan]), 1)).all()


@pytest.mark.parametrize("window", [2, 4])
def test_windows_of_even_length_stay_centred(window):
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, window)[window:-window], line[window:-window])
