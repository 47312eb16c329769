import numpy as np
import pytest

from hf_aegis.reports.drift_plane import drift_plane


def along(*components):
    return np.asarray([*components, *[0.0] * (6 - len(components))])


@pytest.fixture
def base():
    return np.random.default_rng(0).normal(size=(50, 6))


def test_the_plane_holds_both_mean_displacements(base):
    random = np.random.default_rng(1)
    naive = base + along(3) + random.normal(0, 0.1, base.shape)
    aegis = base + along(1, 1) + random.normal(0, 0.1, base.shape)
    plane = drift_plane(base, naive, aegis)
    centroids = {name: points.mean(0) for name, points in plane.points.items()}
    np.testing.assert_allclose(centroids["pretrained"], 0, atol=1e-12)
    for name, states in (("naive", naive), ("aegis", aegis)):
        length = np.linalg.norm((states - base).mean(0))
        assert plane.drifts[name] == pytest.approx(length)
        assert np.linalg.norm(centroids[name]) == pytest.approx(length)
    assert centroids["naive"][1] == pytest.approx(0, abs=1e-12)
    # The angle between both drifts is kept: 45 degrees but for noise.
    assert centroids["aegis"][0] / np.linalg.norm(centroids["aegis"]) == pytest.approx(np.sqrt(0.5), abs=0.05)
    assert plane.second_axis == "aegis"
    # 9 + 1 and 1 of 11, but for the noise in six dimensions.
    np.testing.assert_allclose(plane.shares, (10 / 11, 1 / 11), atol=0.02)
    assert sum(plane.shares) < 1


def test_parallel_drifts_get_the_leading_residual_as_second_axis(base):
    wave = np.sin(np.arange(len(base)))[:, None] * along(0, 0, 0, 1)
    naive = base + along(2) + wave - wave.mean(0)
    aegis = base + along(0.5)
    plane = drift_plane(base, naive, aegis)
    assert plane.second_axis == "residual"
    moved = plane.points["naive"] - plane.points["pretrained"]
    np.testing.assert_allclose(np.abs(moved[:, 1]), np.abs((wave - wave.mean(0))[:, 3]), atol=1e-9)
    assert sum(plane.shares) == pytest.approx(1)


def test_one_model_that_did_not_move_still_has_a_plane(base):
    naive = base + along(0, 1) + np.random.default_rng(2).normal(0, 0.1, base.shape)
    for pair in ((naive, base), (base, naive)):
        plane = drift_plane(base, *pair)
        assert all(np.isfinite(points).all() for points in plane.points.values())
        assert plane.shares[0] > 0.9


def test_no_drift_and_other_samples_are_refused(base):
    with pytest.raises(ValueError, match="neither model have moved"):
        drift_plane(base, base, base)
    with pytest.raises(ValueError, match=r"one shape, found \(50, 6\), \(49, 6\)"):
        drift_plane(base, base[1:], base)
