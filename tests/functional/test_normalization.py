"""Quantile normalisation: where quantiles land, exact inverses, guarded dimensions, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_aegis.functional.normalization import (
    MINIMUM_HALF_RANGE,
    DatasetStatistics,
    FeatureStatistics,
    normalize,
    unnormalize,
)


def matrices(max_magnitude: float = 1e3) -> st.SearchStrategy[np.ndarray]:
    shape = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
    return hnp.arrays(np.float64, shape, elements=st.floats(-max_magnitude, max_magnitude, allow_subnormal=False))


def ramp(low: float = -1.0, high: float = 1.0, dimension: int = 2) -> FeatureStatistics:
    return FeatureStatistics.from_samples("actions", np.linspace([low] * dimension, [high] * dimension, 101))


def test_statistics_of_a_hand_computed_case():
    statistics = FeatureStatistics.from_samples("actions", np.arange(101.0)[:, None])
    assert (statistics.q01, statistics.q99) == ((1.0,), (99.0,))
    assert (statistics.min, statistics.max, statistics.mean, statistics.count) == ((0.0,), (100.0,), (50.0,), 101)
    assert statistics.std[0] == pytest.approx(np.sqrt((101**2 - 1) / 12))


def test_quantiles_land_on_the_ends_and_outliers_are_clipped():
    statistics = FeatureStatistics.from_samples("actions", np.arange(101.0)[:, None])
    values = np.array([[1.0], [50.0], [99.0], [100.0], [-7.0]])
    np.testing.assert_allclose(normalize(values, statistics)[:, 0], [-1, 0, 1, 1, -1])
    np.testing.assert_allclose(normalize(values, statistics, clip=False)[3:, 0], [50 / 49, -57 / 49])


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_unnormalize_inverts_normalize_whatever_the_samples(samples):
    statistics = FeatureStatistics.from_samples("state", samples)
    back = unnormalize(normalize(samples, statistics, clip=False), statistics)
    np.testing.assert_allclose(back, samples, rtol=0, atol=1e-12 * max(1.0, np.abs(samples).max()))
    single = samples.astype(np.float32)
    back = unnormalize(normalize(single, statistics, clip=False), statistics)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, single, rtol=0, atol=1e-6 * max(1.0, np.abs(samples).max()))


@settings(max_examples=60, deadline=None)
@given(matrices(), st.floats(-10, 10))
def test_no_dimension_is_stretched_beyond_the_documented_floor(samples, shift):
    statistics = FeatureStatistics.from_samples("state", samples)
    moved = normalize(samples + shift, statistics, clip=False) - normalize(samples, statistics, clip=False)
    assert np.all(np.abs(moved) <= abs(shift) / MINIMUM_HALF_RANGE * (1 + 1e-9) + 1e-6)
    clipped = normalize(samples, statistics)
    assert np.all((clipped >= -1) & (clipped <= 1))


@settings(max_examples=40, deadline=None)
@given(matrices(), st.booleans())
def test_torch_and_numpy_agree(samples, clip):
    statistics = FeatureStatistics.from_samples("state", samples)
    tensor = torch.from_numpy(samples)
    np.testing.assert_allclose(normalize(tensor, statistics, clip), normalize(samples, statistics, clip), atol=1e-9)
    np.testing.assert_allclose(unnormalize(tensor, statistics), unnormalize(samples, statistics), atol=1e-9)


def test_a_constant_dimension_with_sensor_noise_stays_small():
    noise = 1e-6 * np.sin(np.arange(200.0))[:, None]
    mapped = normalize(noise, FeatureStatistics.from_samples("state", noise), clip=False)
    assert np.abs(mapped).max() <= 1e-6 / MINIMUM_HALF_RANGE * 2


def test_a_dimension_that_rarely_moves_keeps_its_whole_range():
    actions = np.zeros((1000, 1))
    actions[:5] = 0.4  # beyond the 99 % quantile: clipping at the quantiles would erase these actions
    statistics = FeatureStatistics.from_samples("actions", actions)
    assert statistics.q99 == (0.0,)
    np.testing.assert_allclose(unnormalize(normalize(actions, statistics), statistics), actions, atol=1e-15)
    assert np.abs(normalize(actions, statistics, clip=False)).max() == 1.0


def test_gripper_fingers_use_their_quantiles():
    opening = np.linspace(0.0, 0.04, 101)[:, None]
    mapped = normalize(opening, FeatureStatistics.from_samples("state", opening), clip=False)
    assert mapped.min() == pytest.approx(-0.02 / 0.0196)


def test_leading_dimensions_dtype_and_device_are_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        mapped = normalize(torch.zeros(3, 5, 2, dtype=dtype), ramp())
        assert mapped.shape == (3, 5, 2)
        assert mapped.dtype == dtype
    assert normalize(np.zeros(2, np.float16), ramp()).dtype == np.float16


def test_half_precision_is_mapped_in_single_precision():
    statistics = ramp(low=100.0, high=101.0, dimension=1)
    value = torch.tensor([100.5], dtype=torch.bfloat16)  # exact in bfloat16, as the statistics' centre
    assert normalize(value, statistics).item() == pytest.approx(0.0, abs=1e-4)


def test_gradients_flow_through_unnormalize():
    values = torch.zeros(1, 2, requires_grad=True)
    unnormalize(values, ramp(low=-3.0, high=3.0)).sum().backward()
    np.testing.assert_allclose(values.grad, [[2.94, 2.94]], rtol=1e-6)


@pytest.mark.parametrize("function", [normalize, unnormalize])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_nan_and_infinity_are_refused(function, bad, make):
    with pytest.raises(ValueError, match=r"'actions' holds NaN or infinity, first at index \[1, 0\]"):
        function(make([[0.0, 0.0], [bad, 0.0]]), ramp())


@pytest.mark.parametrize("function", [normalize, unnormalize])
def test_a_dimension_mismatch_names_the_feature_and_both_sides(function):
    with pytest.raises(ValueError, match=r"'actions' of shape \(4, 7\) .* expected \(\.\.\., 2\)"):
        function(np.zeros((4, 7)), ramp())
    with pytest.raises(ValueError, match=r"'actions' of shape \(\)"):
        function(torch.tensor(1.0), ramp())


def test_integers_are_refused():
    with pytest.raises(TypeError, match="'actions' must be floating point, found int64"):
        normalize(np.zeros((1, 2), np.int64), ramp())


@settings(max_examples=25, deadline=None)
@given(matrices(), matrices())
def test_dictionaries_survive_json_exactly(state, actions):
    statistics = DatasetStatistics(
        state=FeatureStatistics.from_samples("state", state),
        actions=FeatureStatistics.from_samples("actions", actions),
    )
    assert DatasetStatistics.from_dict(json.loads(json.dumps(statistics.to_dict()))) == statistics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q01": (0.0,)}, "'q99' has 2 dimensions, 'q01' has 1"),
        ({"q01": (2.0, 2.0)}, "dimension 0 breaks min <= q01 <= q99 <= max"),
        ({"std": (float("nan"), 1.0)}, "'std' of dimension 0 is nan"),
        ({"std": "12"}, "'std' must be a list of numbers"),
        ({"count": 0}, "count must be an integer of at least 1"),
        ({"count": True}, "count must be an integer of at least 1"),
        ({"q01": ["1"]}, "'q01' must be a list of numbers"),
        ({"name": None}, "'name' must be a text"),
    ],
)
def test_impossible_statistics_are_refused(change, message):
    with pytest.raises(ValueError, match=f"statistics.*{message}"):
        replace(ramp(), **change)


def test_missing_and_unknown_keys_are_named():
    values = {"state": ramp().to_dict(), "actions": ramp().to_dict()}
    del values["actions"]["q99"]
    with pytest.raises(ValueError, match=r"statistics of 'actions': missing \['q99'\]"):
        DatasetStatistics.from_dict(values)
    with pytest.raises(ValueError, match=r"dataset statistics: unknown \['reward'\]"):
        DatasetStatistics.from_dict({"state": {}, "actions": {}, "reward": {}})


@pytest.mark.parametrize("samples", [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)])
def test_statistics_need_samples(samples):
    with pytest.raises(ValueError, match=r"statistics of 'state' need samples of shape \(N, D\)"):
        FeatureStatistics.from_samples("state", samples)


def test_statistics_refuse_nan():
    with pytest.raises(ValueError, match=r"'state' holds NaN or infinity, first at index \[2, 1\]"):
        FeatureStatistics.from_samples("state", np.array([[0, 0], [0, 0], [0, np.nan]]))
